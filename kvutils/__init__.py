"""kvutils: the image tokens of a multimodal language model's key-value cache, captured, probed and patched.

Replication of "Visual Representations inside the Language Model" (Liu, Kamath, Grunde-McLaughlin, Han, Krishna;
COLM 2025; arXiv 2510.04819).

    >>> import kvutils as kv
    >>> mlm = kv.load_mlm("pocket")
    >>> shot = kv.capture(mlm, ["photo.jpg"])[0]     # one vision pass
    >>> shot.value(3).shape                          # (N, G*D) image value tokens of layer 3
    torch.Size([145, 32])

`help(kv.capture)` tells shapes, units and errors of a name, with an example; in these `mlm` is kv.load_mlm("pocket"), and `scene` a picture,
kv.open_dataset("pocket-coco", count=1)[0].image or one of your own.

What `kv.` offers (each is loaded when it is first used):

    load_mlm          a multimodal language model by name, folder or hub id
    wrap_mlm          a model of one of the three families that is in memory already
    load_encoder      a SigLIP vision tower by name, folder or hub id
    capture           pictures -> keys, values, tower and projector features of their image tokens
    Capture           what one picture became: tensors and their TokenLayout
    text_values       values of words: what the language model stores for a text
    TokenLayout       which image token stands where in the sequence and in the picture
    KeyVariance       the variance of keys over many images, from a stream
    key_variance      that variance for a list of pictures
    KeySelection      which image keys of which layers and heads
    select_region     the keys of the image tokens in a box or a mask of the picture
    block_keys        with block_keys(...): text cannot attend to the selected image keys
    ImageSession      questions about one picture that is read once, with or without blocked keys
    fit_linear_probe  logistic regression of all feature sources or layers at once
    open_dataset      a data set by name: generated ones, and the real ones of the paper
    explore           a widget: click a picture, ask, see attention, block image keys and ask again

One vocabulary of shapes is used everywhere:

    B  batch                      N  image tokens of one image
    L  layers                     T  all tokens of a sequence
    H  query heads                D  head dimension
    G  key-value heads            C  channels of a vision-tower or projector feature
    S  feature sources (pixels, encoder, projector, value of layer l, ...)
    K  classes or key points
"""

import atexit
import gc
import os
from importlib import import_module
from pathlib import Path

# Read when torch is loaded, if that is later: threads that wait for one another leave the cores to other work. Where they spin, which is
# torch's default, small models are ten times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
atexit.register(gc.freeze)  # a second less: at the exit Python looks for garbage among the million objects of torch and transformers

__version__ = "0.1.0"
VOID = 255  # value of mask pixels without annotation: excluded from training and from every score
_HOME = {
    "load_mlm": "models", "wrap_mlm": "models", "load_encoder": "models", "capture": "kvcache", "Capture": "kvcache", "text_values": "readout.words",
    "TokenLayout": "layout", "KeyVariance": "keys", "key_variance": "keys", "KeySelection": "keys", "select_region": "keys", "block_keys": "block",
    "ImageSession": "answer", "fit_linear_probe": "probes", "open_dataset": "datasets", "explore": "explorer.widget"}  # fmt: skip
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    """A name of the face, from the module that defines it: `import kvutils` itself imports no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'kvutils' has no attribute {name!r}; it offers {', '.join(__all__)}", name=name)
    globals()[name] = getattr(import_module(f"kvutils.{_HOME[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name not in ("Path", "atexit", "gc", "import_module", "os"))])


def data_folder() -> Path:
    """Where the shipped data lie (claims, pocket weights): inside an installed package, or beside it in a clone."""
    inside = Path(__file__).resolve().parent / "data"
    return inside if inside.is_dir() else inside.parents[1] / "data"


def named_folder(variable: str) -> Path | None:
    """The folder that an environment variable such as KVUTILS_DATA names, absolute ("~": home); None where it is not set."""
    named = os.environ.get(variable)
    return Path(os.path.abspath(os.path.expanduser(named))) if named else None
