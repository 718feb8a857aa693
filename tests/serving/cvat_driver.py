"""Runs in an environment with cvat-sdk alone: `python cvat_driver.py FILE IMAGE SERVER TYPE`.

The function's shapes go through the checks of CVAT's own driver, and come out as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys

from cvat_sdk import models
from cvat_sdk.auto_annotation import driver
from cvat_sdk.masks import decode_mask
from PIL import Image

file, picture, server, kind = sys.argv[1:]
spec = importlib.util.spec_from_file_location("function", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
function = module.create(server=server, prompts="circle, cross", type=kind)
image = Image.open(picture)
found = []
for to_polygon in (False, True):
    expected = "polygon" if to_polygon and kind == "mask" else kind
    labels = [
        models.Label(id=40 + number, name=name, type=expected, attributes=[], sublabels=[])
        for number, name in enumerate(("cross", "circle"))
    ]
    mapper = driver._AnnotationMapper(
        logging.getLogger(),
        function.spec.labels,
        labels,
        allow_unmatched_labels=False,
        conv_mask_to_poly=to_polygon,
    )
    context = driver._DetectionFunctionContextImpl(
        frame_name="a", conf_threshold=0.3, conv_mask_to_poly=to_polygon
    )
    _, shapes = mapper.validate_and_remap(function.detect(context, image), 5)
    for shape in shapes:
        points = list(shape.points)
        if shape.type.value == "mask":
            width, height = image.size
            points = decode_mask(points, image_width=width, image_height=height).tolist()
        entry = {"label": shape.label_id, "frame": shape.frame, "type": shape.type.value}
        found.append({**entry, "points": points})
print(json.dumps(found))
