from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config as zoo_config

from fpn_plugin.lazy import get_config, with_pyramid

# FCOS has no yacs config in Detectron2; its own lazy one gets the plugin's pyramid.
retinanet = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
model, optimizer, lr_multiplier, dataloader, train = get_config(retinanet).values()
model = with_pyramid(zoo_config("COCO-Detection/fcos_R_50_FPN_1x.py").model)

# Detectron2 writes these as numbers; here they follow the pyramid's.
model.backbone.top_block.in_channels = "${..out_channels}"
model.head.input_shape = [L(ShapeSpec)(channels="${....backbone.out_channels}") for _ in range(5)]
model.head.conv_dims = ["${...backbone.out_channels}"] * 4
