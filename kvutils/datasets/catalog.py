"""What there is to know about each real data set: where it comes from, how large it is, its licence, its files.

The loaders say what is missing with `missing_data`; `kvutils.download` fetches what may be fetched; `kvutils.plan`
counts the gigabytes. Sizes and checksums are those that are published beside the files, or that other public projects
record; where there is none the field says so. Nothing here is downloaded by being imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvutils.errors import DataError


@dataclass(frozen=True)
class Download:
    """One file to fetch. path: where it goes, relative to `KVUTILS_DATA`; an archive (zip, tar, tgz) is extracted into
    that folder instead. size: bytes, None where nobody states it. checksum: "md5:..." or "sha256:...", "" for none."""

    url: str
    path: str
    size: int | None = None
    checksum: str = ""


@dataclass(frozen=True)
class About:
    """A real data set. gigabytes: to download, everything it needs of its own included. tree: the official layout
    below `KVUTILS_DATA`. downloads: what may be fetched freely; steps: what a person has to do for the rest (none
    if everything is free). needs: other data sets whose files it uses. hub: data-set repository on the Hugging Face hub
    that holds it as Parquet, "" for none."""

    name: str
    title: str
    gigabytes: float
    licence: str
    source: str
    tree: str
    downloads: tuple[Download, ...] = ()
    steps: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    hub: str = ""


CATALOG: dict[str, About] = {
    about.name: about
    for about in (
        About(
            "pascal-5i", "Pascal-5i (PASCAL VOC 2012, lists of HSNet)", 2.0,
            "images from flickr under its terms, for research", "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
            """\
pascal-5i/VOC2012/JPEGImages/2007_000129.jpg ...
pascal-5i/VOC2012/SegmentationClass/2007_000129.png ...      (of the VOC archive, enough; or SegmentationClassAug)
pascal-5i/splits/pascal/val/fold0.txt ... fold3.txt          (HSNet's data/splits)""",
        ),
        About(
            "msrc", "MSRC v2", 0.1, "Microsoft, research only", "MSRC_ObjCategImageDatabase_v2.zip of Microsoft Research Cambridge",
            """\
msrc/MSRC_ObjCategImageDatabase_v2/Images/5_1_s.bmp ...
msrc/MSRC_ObjCategImageDatabase_v2/GroundTruth/5_1_s_GT.bmp ...""",
        ),
        About(
            "imagenet-s", "ImageNet-S (validation, and train-semi for the probe)", 6.8, "ImageNet terms of access, research only",
            "https://github.com/LUSSeg/ImageNet-S",
            """\
imagenet-s/ImageNetS50/validation/n01443537/ILSVRC2012_val_00000236.JPEG ...
imagenet-s/ImageNetS50/validation-segmentation/n01443537/ILSVRC2012_val_00000236.png ...
imagenet-s/ImageNetS50/train-semi/..., train-semi-segmentation/...   (for the supervised probe)
imagenet-s/data/categories/ImageNetS_categories_im50.txt, data/names/ImageNetS_im50_validation.txt,
imagenet-s/data/names/ImageNetSemi_im50_train.txt, data/data.py   (the repository's folder data)
imagenet-s/imagenet/val/ILSVRC2012_val_00000236.JPEG ...          (instead of the images above: ImageNet's own)""",
        ),
        About(
            "refcoco", "RefCOCO (UNC)", 0.52, "annotations Apache-2.0 / CC BY 4.0, images under their flickr licences",
            "https://github.com/lichengunc/refer",
            """\
refcoco/refcoco/instances.json
refcoco/refcoco/refs(unc).p
coco/train2014/COCO_train2014_000000581857.jpg ...           (or refcoco/images/mscoco/images/train2014/)
refcoco/data/refcoco_unc_val-00000-of-00001-350dcb478fc06c10.parquet   (the hub copy, in place of all these)""",
            needs=("coco",), hub="jxu124/refcoco-benchmark",
        ),
        About(
            "spair-71k", "SPair-71k", 0.23, "not stated clearly; images from PASCAL VOC under its terms",
            "http://cvlab.postech.ac.kr/research/SPair-71k/",
            """\
spair-71k/SPair-71k/Layout/large/test.txt
spair-71k/SPair-71k/PairAnnotation/test/000006-2008_002719-2008_007604:aeroplane.json ...
spair-71k/SPair-71k/JPEGImages/aeroplane/2008_002719.jpg ...""",
        ),
        About(
            "davis-2017", "DAVIS-2017 (trainval, 480p)", 0.8, "CC BY-NC 4.0", "https://davischallenge.org/davis2017/code.html",
            """\
davis-2017/DAVIS/JPEGImages/480p/bike-packing/00000.jpg ...
davis-2017/DAVIS/Annotations/480p/bike-packing/00000.png ...
davis-2017/DAVIS/ImageSets/2017/val.txt""",
        ),
        About(
            "coco", "COCO images", 1.24, "images under their flickr licences, annotations CC BY 4.0", "https://cocodataset.org",
            """\
coco/val2017/000000000139.jpg ...
coco/annotations/instances_val2017.json""",
            hub="detection-datasets/coco",
        ),
        About(
            "pope", "POPE (COCO lists)", 0.01, "MIT; images as COCO", "https://github.com/RUCAIBox/POPE",
            """\
pope/output/coco/coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json
coco/val2014/COCO_val2014_000000310196.jpg ...               (or pope/val2014/)""",
            needs=("coco",), hub="lmms-lab/POPE",
        ),
        About(
            "mme", "MME", 0.9, "images on request from the authors, research only",
            "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models",
            """\
mme/MME_Benchmark_release_version/existence/000000006040.jpg, 000000006040.txt ...
mme/MME_Benchmark_release_version/artwork/images/..., artwork/questions_answers_YN/...""",
            hub="lmms-lab/MME",
        ),
        About(
            "bdd-10k", "BDD100K: 10K images, semantic segmentation, attributes", 1.5, "BDD100K licence: research, not for profit",
            "https://bdd-data.berkeley.edu",
            """\
bdd-10k/bdd100k/images/10k/train/0004a4c0-d4dff0ad.jpg ..., val/...
bdd-10k/bdd100k/labels/sem_seg/masks/train/0004a4c0-d4dff0ad.png ..., val/...
bdd-10k/bdd100k/labels/det_20/det_train.json, det_val.json     (scene, timeofday, weather)
bdd-10k/bdd100k/labels/bdd100k_labels_images_train.json, ...   (those of 2018, in place of det_20)""",
        ),
        About(
            "blink", "BLINK (validation)", 0.6, "Apache-2.0", "https://huggingface.co/datasets/BLINK-Benchmark/BLINK",
            """\
blink/Art_Style/val-00000-of-00001.parquet
blink/Visual_Similarity/val-00000-of-00001.parquet ...""",
            hub="BLINK-Benchmark/BLINK",
        ),
    )
}  # fmt: skip


def data_root() -> Path | None:
    """The folder of the real data sets, `KVUTILS_DATA`; None where it is not set."""
    return Path(os.environ["KVUTILS_DATA"]) if os.environ.get("KVUTILS_DATA") else None


def missing_data(name: str, what: str) -> DataError:
    """The error for a data set that is missing or half extracted; raise it. what: what is missing, and where."""
    about = CATALOG[name]
    place = os.environ.get("KVUTILS_DATA") or "<KVUTILS_DATA>"
    tree = "\n".join(f"    {place}/{line}" for line in about.tree.splitlines())
    get = f'make data DATASETS="{name}"' if about.downloads or about.hub else "by hand, " + " ".join(about.steps)
    hub = f"\n  hub copy    {about.hub}" if about.hub else ""
    return DataError(
        f"{about.title}: {what}\n  get it      {get}\n  from        {about.source}{hub}\n  size        {about.gigabytes:g} GB to "
        f"download\n  licence     {about.licence}\n  expected\n{tree}"
    )
