from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin("paper/faster_rcnn_R_50_FPN.yaml")
