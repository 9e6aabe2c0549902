from detectron2.model_zoo import get_config as zoo_config

from fpn_plugin.lazy import twin, with_pyramid

# FCOS has no yacs config in Detectron2; its own lazy one gets the plugin's pyramid.
_, optimizer, lr_multiplier, dataloader, train = twin("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
model = with_pyramid(zoo_config("COCO-Detection/fcos_R_50_FPN_1x.py").model)
