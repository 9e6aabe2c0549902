from fpn_plugin.lazy import twin

model, optimizer, lr_multiplier, dataloader, train = twin(
    "COCO-Keypoints/keypoint_rcnn_X_101_32x8d_FPN_3x.yaml"
)
