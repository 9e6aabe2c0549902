from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin("paper/table1_c_FPN_unshared.yaml")
