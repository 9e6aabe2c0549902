from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin("mini/faster_rcnn_R_18_FPN.yaml")
