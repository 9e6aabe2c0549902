from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin("Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml")
