from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin("mini/table2_d_bottom_up.yaml")
