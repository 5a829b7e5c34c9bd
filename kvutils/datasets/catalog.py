"""What there is to know about each real data set: where it comes from, how large it is, its licence, its files.

The loaders say what is missing with `missing_data`; `kvutils.run.download` fetches what may be fetched; `kvutils.run.plan`
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
    that folder instead. size: bytes, None where nobody states it. checksum: "md5:..." or "sha256:...", "" for none.
    holds (archives): a file or folder that it brings, relative to `KVUTILS_DATA`; where that is, nothing is fetched.
    strip (archives): a leading folder that is left out. mirrors: other addresses of the very same bytes."""

    url: str
    path: str
    size: int | None = None
    checksum: str = ""
    holds: str = ""
    strip: str = ""
    mirrors: tuple[str, ...] = ()


@dataclass(frozen=True)
class About:
    """A real data set. gigabytes: to download, everything it needs of its own included. tree: the official layout
    below `KVUTILS_DATA`. downloads: what may be fetched freely; steps: what a person has to do for the rest (none
    if everything is free), by_hand: what is there after that (patterns below `KVUTILS_DATA`, "|": or). needs: other
    data sets whose files it uses. hub: data-set repository on the Hugging Face hub that holds it as Parquet, "" for none;
    hub_files: patterns of its files that are needed."""

    name: str
    title: str
    gigabytes: float
    licence: str
    source: str
    tree: str
    downloads: tuple[Download, ...] = ()
    steps: tuple[str, ...] = ()
    by_hand: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    hub: str = ""
    hub_files: tuple[str, ...] = ("*.parquet",)

    @property
    def to_get(self) -> float:
        """Gigabytes to download, the images of other sets that it brings included."""
        return max(self.gigabytes, sum(each.size or 0 for each in self.downloads) / 1e9)

    @property
    def how(self) -> str:
        """Whether it is fetched by a command, from its own pages or the hub, or takes a person."""
        if self.hub and not self.downloads:
            return "free (hub)"
        return " + ".join(["free"] * bool(self.downloads) + ["by hand"] * bool(self.steps))


_COCO = "http://images.cocodataset.org/"  # http: the certificate there is for another name; the checksums decide
_RAW = "https://raw.githubusercontent.com"
_HSNET = f"{_RAW}/juhongm999/hsnet/6b1bc12b3ff9f3950f49c55ab6f089e8d9e0d191/data/splits/pascal"
_POPE = f"{_RAW}/RUCAIBox/POPE/3df3ba1b110ecce25696989577fad583b67d4239/output/coco"
_IMAGENET_S = "https://github.com/LUSSeg/ImageNet-S/releases/download/ImageNet-S"
_LISTS = f"{_RAW}/LUSSeg/ImageNet-S/b2312ba7396151f883362bdc86d71469aa81066e/data"
_SPAIR = "https://cvlab.postech.ac.kr/research/SPair-71k/data/SPair-71k.tar.gz"
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
            downloads=(
                # size: tensorflow/datasets url_checksums/voc.txt; md5: pytorch/vision torchvision/datasets/voc.py
                Download("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar", "pascal-5i",
                         1_999_639_040, "md5:6cd6e144f989b92b3379bac3b3de84fd", "pascal-5i/VOC2012/JPEGImages",
                         strip="VOCdevkit"),
                # computed from the lists of that commit
                Download(f"{_HSNET}/val/fold0.txt", "pascal-5i/splits/pascal/val/fold0.txt", 5536,
                         "sha256:748e2f4732ac502cb3aa1f3768936b394bd7ba4e611ac5bf959291a268e249df"),
                Download(f"{_HSNET}/val/fold1.txt", "pascal-5i/splits/pascal/val/fold1.txt", 7216,
                         "sha256:afce1929e4dacbc13c07f9a26d4ce7738d415e1b18443fe173e58303836f5c14"),
                Download(f"{_HSNET}/val/fold2.txt", "pascal-5i/splits/pascal/val/fold2.txt", 11600,
                         "sha256:50b1f5218e8f882ca65d85da5be230b978a70067e9b3e0e9fca1528f546bd7fb"),
                Download(f"{_HSNET}/val/fold3.txt", "pascal-5i/splits/pascal/val/fold3.txt", 5536,
                         "sha256:c3825d7c52d1608d4c62c5b85d6ef3f74cf5898032bc068a94c971df17bdf71a"),
            ),
        ),
        About(
            "msrc", "MSRC v2", 0.1, "Microsoft, research only", "MSRC_ObjCategImageDatabase_v2.zip of Microsoft Research Cambridge",
            """\
msrc/MSRC_ObjCategImageDatabase_v2/Images/5_1_s.bmp ...
msrc/MSRC_ObjCategImageDatabase_v2/GroundTruth/5_1_s_GT.bmp ...""",
            downloads=(
                # md5: bwhite/vision_data vision_data/_msrc.py, of the copy at the address before this one
                Download("https://download.microsoft.com/download/3/3/9/339D8A24-47D7-412F-A1E8-1A415BC48A15/"
                         "msrc_objcategimagedatabase_v2.zip", "msrc", None, "md5:8fcd292c7f1e69f91a2ef513746bd52c",
                         "msrc/MSRC_ObjCategImageDatabase_v2/GroundTruth"),
            ),
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
            downloads=(
                # the md5 of each is part of its name, as in LUSSeg/ImageNet-S datapreparation/datapreparation_anno.sh
                Download(f"{_IMAGENET_S}/ImageNetS50-a0fe9d82231f9bc4787ee76e304dfa51.zip", "imagenet-s", None,
                         "md5:a0fe9d82231f9bc4787ee76e304dfa51", "imagenet-s/ImageNetS50/validation-segmentation"),
                Download(f"{_IMAGENET_S}/ImageNetS300-dd8e42e156bac415a35c3c239de297bf.zip", "imagenet-s", None,
                         "md5:dd8e42e156bac415a35c3c239de297bf", "imagenet-s/ImageNetS300/validation-segmentation"),
                Download(f"{_IMAGENET_S}/ImageNetS919-5f7f58ae1003d21da9409a8576bf7680.zip", "imagenet-s", None,
                         "md5:5f7f58ae1003d21da9409a8576bf7680", "imagenet-s/ImageNetS919/validation-segmentation"),
                # size, sha256: computed from the files of that commit; the others have no published checksum
                Download(f"{_LISTS}/categories/ImageNetS_categories_im50.txt",
                         "imagenet-s/data/categories/ImageNetS_categories_im50.txt", 499,
                         "sha256:cba1701f5d94bf0dfbb40f2d529daab362dff552b9bfcea4bcdddbb5fcf762ad"),
                Download(f"{_LISTS}/categories/ImageNetS_categories_im300.txt",
                         "imagenet-s/data/categories/ImageNetS_categories_im300.txt", 2999,
                         "sha256:9327409a512019ff7be95354f33daf2735852c04fecd0ac261790ce23e4115ca"),
                Download(f"{_LISTS}/categories/ImageNetS_categories_im919.txt",
                         "imagenet-s/data/categories/ImageNetS_categories_im919.txt", 9189,
                         "sha256:b2ee89cf2d5def583dcea806b8cc99def3d9bb7355ae981fc4c986c6d8dec1da"),
                Download(f"{_LISTS}/mapping/ImageNetS_im50_mapping_validation.txt",
                         "imagenet-s/data/mapping/ImageNetS_im50_mapping_validation.txt", 58655,
                         "sha256:d51e06461f83d3742527768a86e7cb2543adad64ba273cd22dfb27d57ea02458"),
                Download(f"{_LISTS}/mapping/ImageNetS_im300_mapping_validation.txt",
                         "imagenet-s/data/mapping/ImageNetS_im300_mapping_validation.txt"),
                Download(f"{_LISTS}/mapping/ImageNetS_im919_mapping_validation.txt",
                         "imagenet-s/data/mapping/ImageNetS_im919_mapping_validation.txt"),
                Download(f"{_LISTS}/names/ImageNetSemi_im50_train.txt",
                         "imagenet-s/data/names/ImageNetSemi_im50_train.txt"),
                Download(f"{_LISTS}/data.py", "imagenet-s/data/data.py"),
            ),
            # sizes: tensorflow/datasets url_checksums/imagenet2012.txt
            steps=(
                "Log in at https://image-net.org/download.php, accept the terms of access and download the images of "
                "ILSVRC2012: those of validation (6.7 GB), and those of training (148 GB) only for the probe.",
                "Extract them as $KVUTILS_DATA/imagenet-s/imagenet/val/*.JPEG (flat or in folders by class) and "
                "imagenet/train/<class, such as n01443537>/*.JPEG.",
            ),
            # ImageNet as above, or what datapreparation_val.py of LUSSeg/ImageNet-S has made of it
            by_hand=("imagenet-s/imagenet/val|imagenet-s/ImageNetS*/validation",),
        ),
        About(
            "refcoco", "RefCOCO (UNC)", 0.52, "annotations Apache-2.0 / CC BY 4.0, images under their flickr licences",
            "https://github.com/lichengunc/refer",
            """\
refcoco/refcoco/instances.json
refcoco/refcoco/refs(unc).p
coco/train2014/COCO_train2014_000000581857.jpg ...           (or refcoco/images/mscoco/images/train2014/)
refcoco/data/refcoco_unc_val-00000-of-00001-350dcb478fc06c10.parquet   (the hub copy, in place of all these)""",
            downloads=(
                # The address in lichengunc/refer answers no more. This copy in the Internet Archive is the one that
                # README of dvlab-research/LISA and issue 26 of lichengunc/refer name (id_: the bytes as they were).
                # size, sha256: TarunTomar122/attention-is-all-you-need-for-vlms docs/datasets.md
                Download("https://web.archive.org/web/20220413011718id_/https://bvisionweb1.cs.unc.edu/licheng/"
                         "referit/data/refcoco.zip", "refcoco", 53_993_993,
                         "sha256:7f924bb7ed8dc4568058e4ff626281918d56e5206f4c868c5a80f088f38c8bf0",
                         "refcoco/refcoco/instances.json"),
                # size, sha256: tensorflow/datasets url_checksums/coco.txt
                Download(f"{_COCO}zips/train2014.zip", "coco", 13_510_573_713,
                         "sha256:ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775", "coco/train2014"),
            ),
            needs=("coco",), hub="jxu124/refcoco-benchmark", hub_files=("data/refcoco_unc_*.parquet",),
        ),
        About(
            "spair-71k", "SPair-71k", 0.23, "not stated clearly; images from PASCAL VOC under its terms",
            "http://cvlab.postech.ac.kr/research/SPair-71k/",
            """\
spair-71k/SPair-71k/Layout/large/test.txt
spair-71k/SPair-71k/PairAnnotation/test/000006-2008_002719-2008_007604:aeroplane.json ...
spair-71k/SPair-71k/JPEGImages/aeroplane/2008_002719.jpg ...""",
            downloads=(
                # size, sha256, copy in the Internet Archive: pawelswoboda/RationalBasisCNN hpc/download_spair71k.sh
                Download(_SPAIR, "spair-71k", 226_961_117,
                         "sha256:d145eebe4d7d02ff0b9e2746dd3d72cfcb872df0dcfd6f3227576eb594408809",
                         "spair-71k/SPair-71k/PairAnnotation",
                         mirrors=(f"https://web.archive.org/web/20250701134122id_/{_SPAIR}",)),
            ),
        ),
        About(
            "davis-2017", "DAVIS-2017 (trainval, 480p)", 0.8, "CC BY-NC 4.0", "https://davischallenge.org/davis2017/code.html",
            """\
davis-2017/DAVIS/JPEGImages/480p/bike-packing/00000.jpg ...
davis-2017/DAVIS/Annotations/480p/bike-packing/00000.png ...
davis-2017/DAVIS/ImageSets/2017/val.txt""",
            downloads=(
                # size, sha256: tensorflow/datasets video/davis/checksums.tsv
                Download("https://data.vision.ee.ethz.ch/csergi/share/davis/DAVIS-2017-trainval-480p.zip",
                         "davis-2017", 832_766_765,
                         "sha256:e3d0b5b77c3d031b000a19e0e25e3e2cac65d183755601bc2cf066df1a2aa492",
                         "davis-2017/DAVIS/ImageSets/2017/val.txt"),
            ),
        ),
        About(
            "coco", "COCO images", 1.24, "images under their flickr licences, annotations CC BY 4.0", "https://cocodataset.org",
            """\
coco/val2017/000000000139.jpg ...
coco/annotations/instances_val2017.json""",
            downloads=(
                # size, sha256: tensorflow/datasets url_checksums/coco.txt
                Download(f"{_COCO}zips/val2017.zip", "coco", 815_585_330,
                         "sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", "coco/val2017"),
                Download(f"{_COCO}annotations/annotations_trainval2017.zip", "coco", 252_907_541,
                         "sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
                         "coco/annotations/instances_val2017.json"),
            ),
            hub="detection-datasets/coco", hub_files=("data/val-*",),
        ),
        About(
            "pope", "POPE (COCO lists)", 0.01, "MIT; images as COCO", "https://github.com/RUCAIBox/POPE",
            """\
pope/output/coco/coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json
coco/val2014/COCO_val2014_000000310196.jpg ...               (or pope/val2014/)""",
            downloads=(
                # computed from the lists of that commit (an older random list of 2,910 questions is in circulation)
                Download(f"{_POPE}/coco_pope_random.json", "pope/output/coco/coco_pope_random.json", 368_166,
                         "sha256:ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994"),
                Download(f"{_POPE}/coco_pope_popular.json", "pope/output/coco/coco_pope_popular.json", 370_190,
                         "sha256:72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753"),
                Download(f"{_POPE}/coco_pope_adversarial.json", "pope/output/coco/coco_pope_adversarial.json",
                         370_401, "sha256:420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8"),
                # size, sha256: tensorflow/datasets url_checksums/coco.txt
                Download(f"{_COCO}zips/val2014.zip", "coco", 6_645_013_297,
                         "sha256:fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0", "coco/val2014"),
            ),
            needs=("coco",), hub="lmms-lab/POPE",
        ),
        About(
            "mme", "MME", 0.9, "images on request from the authors, research only",
            "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models",
            """\
mme/MME_Benchmark_release_version/existence/000000006040.jpg, 000000006040.txt ...
mme/MME_Benchmark_release_version/artwork/images/..., artwork/questions_answers_YN/...""",
            steps=(
                "Instead of the hub copy: ask the authors for the images as https://github.com/BradyFU/"
                "Awesome-Multimodal-Large-Language-Models (branch Evaluation) says.",
                "Extract the archive as $KVUTILS_DATA/mme/MME_Benchmark_release_version.",
            ),
            by_hand=("mme/MME_Benchmark_release_version",),
            hub="lmms-lab/MME", hub_files=("data/test-*.parquet",),
        ),
        About(
            "bdd-10k", "BDD100K: 10K images, semantic segmentation, attributes", 1.5, "BDD100K licence: research, not for profit",
            "https://bdd-data.berkeley.edu",
            """\
bdd-10k/bdd100k/images/10k/train/0004a4c0-d4dff0ad.jpg ..., val/...
bdd-10k/bdd100k/labels/sem_seg/masks/train/0004a4c0-d4dff0ad.png ..., val/...
bdd-10k/bdd100k/labels/det_20/det_train.json, det_val.json     (scene, timeofday, weather)
bdd-10k/bdd100k/labels/bdd100k_labels_images_train.json, ...   (those of 2018, in place of det_20)""",
            # names, sizes, md5: bdd100k/bdd100k doc/source/download.rst
            steps=(
                "Log in at https://bdd-data.berkeley.edu, agree to the BDD100K licence and open the download portal.",
                'Download "10K Images" (1.1 GB, md5 08f26aecceda982568063d3d5873378e), "Semantic Segmentation" '
                '(331 MB) and "Detection 2020 Labels" (53 MB, md5 b86a3e1b7edbcad421b7dad2b3987c94).',
                "Extract each in $KVUTILS_DATA/bdd-10k, so that there are bdd100k/images/10k/{train,val}, "
                "bdd100k/labels/sem_seg/masks/{train,val} and bdd100k/labels/det_20/det_{train,val}.json.",
            ),
            by_hand=("bdd-10k/bdd100k/images/10k/val", "bdd-10k/bdd100k/labels/sem_seg/masks/val",
                     "bdd-10k/bdd100k/labels/det_20/det_val.json|"
                     "bdd-10k/bdd100k/labels/bdd100k_labels_images_val.json"),
        ),
        About(
            "blink", "BLINK (validation)", 0.6, "Apache-2.0", "https://huggingface.co/datasets/BLINK-Benchmark/BLINK",
            """\
blink/Art_Style/val-00000-of-00001.parquet
blink/Visual_Similarity/val-00000-of-00001.parquet ...""",
            hub="BLINK-Benchmark/BLINK", hub_files=("*/val-*.parquet",),
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
        f"{about.title}: {what}\n  get it      {get}\n  from        {about.source}{hub}\n  size        {about.to_get:.2g} GB to "
        f"download\n  licence     {about.licence}\n  expected\n{tree}"
    )
