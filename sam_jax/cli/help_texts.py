"""Help texts that several verbs share."""

SLICE_HELP = "the images to use, a slice as in Python: 0::5, :100, 7; default: all"
WEIGHTS_HELP = (
    "a weights directory, a checkpoint file, or one of sam_vit_b, sam_vit_l, sam_vit_h, sam_tiny, "
    "sam_nuclei and sam_photo"
)
