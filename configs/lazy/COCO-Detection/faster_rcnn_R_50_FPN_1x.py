from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin(
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
)
