from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin("paper/table1_f_P2.yaml")
