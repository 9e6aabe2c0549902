from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin("paper/table5_R_50_shared.yaml")
