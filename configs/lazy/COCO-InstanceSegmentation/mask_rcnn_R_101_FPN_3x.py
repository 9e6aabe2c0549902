from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin(
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml"
)
