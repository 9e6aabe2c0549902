from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin(
    "COCO-PanopticSegmentation/panoptic_fpn_R_101_3x.yaml"
)
