from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin("mini/table4_R_101_FPN.yaml")
