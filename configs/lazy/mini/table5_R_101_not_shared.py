from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin("mini/table5_R_101_not_shared.yaml")
