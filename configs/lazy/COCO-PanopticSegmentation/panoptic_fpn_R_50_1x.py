from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin(
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
)
