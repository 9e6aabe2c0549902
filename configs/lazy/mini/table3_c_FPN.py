from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin("mini/table3_c_FPN.yaml")
