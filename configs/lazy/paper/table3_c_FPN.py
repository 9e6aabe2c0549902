from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin("paper/table3_c_FPN.yaml")
