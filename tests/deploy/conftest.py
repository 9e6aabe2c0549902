from tests.helpers.detectors import config_of, detector, images, scenes  # noqa: F401
