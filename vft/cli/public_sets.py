"""Public data sets: where each comes from, where it goes and what reads it, for `vft download`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vft import benchmarks


@dataclass(frozen=True)
class Part:
    """Files of a repository on the hub that are fetched together."""

    patterns: tuple[str, ...]
    """Names with `*`; a `*` matches `/` too."""
    repository: str
    gb: float = 0.0
    """Approximate size, 10^9 bytes; 0: unknown, see the set's page."""
    kind: Literal["dataset", "model"] = "dataset"
    folder: str = "."
    """Folder to fetch to, below that of the set."""


@dataclass(frozen=True)
class DataSet:
    """Where a set comes from and where it goes."""

    page: str
    source: str = ""
    """The entry of `data.sources` that reads it; empty if only `vft benchmark` does."""
    benchmarks: tuple[str, ...] = ()
    """Its names in `vft benchmark`."""
    licence: str = "see the set's page"
    parts: Mapping[str, Part] = field(default_factory=dict)
    gb: float = 0.0
    """Approximate size of the whole set, unpacked, 10^9 bytes; 0: unknown."""
    steps: tuple[str, ...] = ()
    """Commands to run by hand in the set's folder, after the parts have been fetched."""

    @property
    def folder(self) -> str:
        """Its folder, below that of all sets."""
        path = self.source.partition('path = "')[2] or benchmarks.find(self.benchmarks[0]).path
        return path.partition("/")[0]


LLAVA_VIDEO = "lmms-lab/LLaVA-Video-178K"
LLAVA_VIDEO_PARTS = (
    *(
        f"{span}_{origin}"
        for span in ("0_30_s", "30_60_s", "1_2_m", "2_3_m")
        for origin in ("academic_v0_1", "youtube_v0_1", "nextqa", "activitynetqa")
    ),
    "0_30_s_perceptiontest",
    "30_60_s_perceptiontest",
    "llava_hound",
)
LLAVA_HOUND = "ShareGPTVideo/train_video_and_instruction"
NEXTQA = "lmms-eval/NExTQA"
VIDEO_MME = "lmms-eval/Video-MME"
"""Its earlier name, lmms-lab/Video-MME, redirects to this one."""
ACTIVITYNET_VIDEOS = (
    "ask for ActivityNet's videos at http://activity-net.org/download.html; put them in {root}/ActivityNet/videos"
)

SETS: dict[str, DataSet] = {
    "llava-video-178k": DataSet(
        page=f"https://huggingface.co/datasets/{LLAVA_VIDEO}",
        licence="Apache 2.0; by its page for academic research and education only, and OpenAI's usage policy",
        source='{ format = "llava_video", path = "LLaVA-Video-178K/0_30_s_academic_v0_1" }',
        parts={name: Part((f"{name}/*",), LLAVA_VIDEO) for name in LLAVA_VIDEO_PARTS},
        gb=1500.0,
        steps=(
            'for part in */*.tar.gz; do tar -xzf "$part" -C "$(dirname "$part")" && rm "$part"; done',
            "(not for sources with stream = true: these read the archives as they are)",
        ),
    ),
    "video-mme": DataSet(
        page=f"https://huggingface.co/datasets/{VIDEO_MME}",
        licence="academic research only, no commercial use; the videos belong to their owners",
        source='{ format = "video_mme", path = "Video-MME/videomme" }',
        benchmarks=("video_mme", "video_mme_subtitles"),
        parts={
            "questions": Part(("videomme/*",), VIDEO_MME),
            "subtitles": Part(("subtitle.zip",), VIDEO_MME),
            "videos": Part(("videos_chunked_*.zip",), VIDEO_MME, gb=101.0),
        },
        steps=('for part in *.zip; do unzip -n "$part" && rm "$part"; done',),
    ),
    "pe-video": DataSet(
        page="https://huggingface.co/datasets/facebook/PE-Video",
        source='{ format = "pe_video", path = "PE-Video/train", stream = true }',
        parts={name: Part((f"{name}/*",), "facebook/PE-Video") for name in ("train", "test", "extended")},
    ),
    "llava-instruct-150k": DataSet(
        page="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
        licence="CC BY 4.0, and OpenAI's terms of use; COCO's pictures: https://cocodataset.org/#termsofuse",
        source='{ format = "llava_instruct", path = "LLaVA-Instruct-150K/llava_instruct_150k.json" }',
        parts={
            name: Part((f"{name}.json",), "liuhaotian/LLaVA-Instruct-150K", gb=0.2)
            for name in ("llava_instruct_150k", "conversation_58k", "detail_23k", "complex_reasoning_77k")
        },
        steps=(
            "wget -c http://images.cocodataset.org/zips/train2017.zip        (19 GB, and as much again unpacked)",
            "unzip -n -q train2017.zip -d ../coco && rm train2017.zip",
        ),
    ),
    "llava-hound-dpo": DataSet(
        page=f"https://huggingface.co/datasets/{LLAVA_HOUND}",
        licence="Apache 2.0; the videos belong to their owners",
        source='{ format = "messages", path = "LLaVA-Hound-DPO/video_instruction/train/dpo/sft_dpo_17k.jsonl", '
        'media = "LLaVA-Hound-DPO/train_300k" }',
        parts={
            "pairs": Part(("video_instruction/train/dpo/*",), LLAVA_HOUND, gb=0.01),
            "frames": Part(("train_300k/*",), LLAVA_HOUND, gb=139.0),
        },
        steps=('for part in train_300k/*.tar.gz; do tar -xzf "$part" -C train_300k && rm "$part"; done',),
    ),
    "rlaif-v": DataSet(
        page="https://huggingface.co/datasets/openbmb/RLAIF-V-Dataset",
        licence="CC BY-NC 4.0",
        source='{ format = "messages", path = "RLAIF-V/RLAIF-V-Dataset_*.parquet" }',
        parts={"pairs": Part(("*.parquet",), "openbmb/RLAIF-V-Dataset", gb=13.0)},
    ),
    "ucf101": DataSet(
        page="https://www.crcv.ucf.edu/data/UCF101.php",
        source='{ format = "ucf101", path = "UCF101/ucfTrainTestlist/trainlist01.txt" }',
        gb=7.0,
        steps=(
            "wget -c https://www.crcv.ucf.edu/data/UCF101/UCF101.rar && unrar x -o- UCF101.rar",
            "wget -c https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip",
            "unzip -n UCF101TrainTestSplits-RecognitionTask.zip",
        ),
    ),
    "kinetics-700": DataSet(
        page="https://github.com/cvdfoundation/kinetics-dataset",
        source='{ format = "kinetics", path = "Kinetics-700/k700-2020/annotations/train.csv" }',
        gb=700.0,
        steps=(
            "git clone https://github.com/cvdfoundation/kinetics-dataset",
            "bash kinetics-dataset/k700_2020_downloader.sh        (goes on where it stopped)",
            "for split in train val test; do mkdir -p k700-2020/$split; "
            "for part in k700-2020_targz/$split/*.tar.gz; do "
            'tar -xzf "$part" -C k700-2020/$split && rm "$part"; done; done',
            "what is left in k700-2020_targz did not unpack: fetch it again. (Their k700_2020_extractor.sh succeeds "
            "in any case: an `&& rm` behind it loses such archives.)",
        ),
    ),
    "ssv2": DataSet(
        page="https://www.qualcomm.com/developer/software/something-something-v-2-dataset",
        source='{ format = "ssv2", path = "SSv2/labels/train.json" }',
        gb=20.0,
        steps=(
            "register at the set's page; download the parts of the videos, and the labels",
            "cat 20bn-something-something-v2-?? | tar -xz        (gives 20bn-something-something-v2/*.webm)",
            "put train.json, validation.json and labels.json in labels/",
        ),
    ),
    "activitynet-captions": DataSet(
        page="https://cs.stanford.edu/people/ranjaykrishna/densevid/",
        source='{ format = "story", path = "ActivityNet/train.jsonl" }',
        steps=(
            ACTIVITYNET_VIDEOS,
            "wget -c https://cs.stanford.edu/people/ranjaykrishna/densevid/captions.zip && unzip -n captions.zip",
            "python tools/convert/activitynet_captions.py {root}/ActivityNet/train.json --root {root} "
            "--videos ActivityNet/videos --output {root}/ActivityNet/train.jsonl",
        ),
    ),
    "charades-sta": DataSet(
        page="https://github.com/jiyanggao/TALL",
        source='{ format = "moments", path = "Charades-STA/charades_sta_train.txt" }',
        gb=16.0,
        steps=(
            "charades_sta_train.txt and charades_sta_test.txt: the links on the set's page",
            "videos: 'Data (scaled to 480p)' of https://prior.allenai.org/projects/charades, in Charades_v1_480/",
        ),
    ),
    "qvhighlights": DataSet(
        page="https://github.com/jayleicn/moment_detr",
        licence="the annotations CC BY-NC-SA 4.0; the videos: see the set's page",
        source='{ format = "moments", path = "QVHighlights/highlight_train_release.jsonl" }',
        steps=(
            "git clone https://github.com/jayleicn/moment_detr && cp moment_detr/data/highlight_*.jsonl .",
            "wget -c https://nlp.cs.unc.edu/data/jielei/qvh/qvhilights_videos.tar.gz",
            "tar -xzf qvhilights_videos.tar.gz        (the .mp4 files belong in videos/)",
        ),
    ),
    "didemo": DataSet(
        page="https://github.com/LisaAnne/LocalizingMoments",
        source='{ format = "moments", path = "DiDeMo/train_data.json" }',
        steps=(
            "git clone https://github.com/LisaAnne/LocalizingMoments && cp LocalizingMoments/data/*_data.json .",
            "videos: see 'Getting the Videos' on the set's page; put them in videos/",
        ),
    ),
    "videoxum": DataSet(
        page="https://huggingface.co/datasets/jylins/videoxum",
        licence="Apache 2.0 for the texts; ActivityNet's videos: see the set's page",
        source='{ format = "story", path = "VideoXum/train.jsonl" }',
        parts={"annotations": Part(("*.json",), "jylins/videoxum")},
        steps=(
            ACTIVITYNET_VIDEOS,
            "python tools/convert/videoxum.py {root}/VideoXum/train_videoxum.json --root {root} "
            "--videos ActivityNet/videos --output {root}/VideoXum/train.jsonl",
        ),
    ),
    "shot2story": DataSet(
        page="https://huggingface.co/datasets/mhan/shot2story",
        licence="CC BY-NC-SA 4.0; the videos: to be accepted on https://huggingface.co/mhan/shot2story-videos first",
        source='{ format = "story", path = "Shot2Story/train.jsonl" }',
        parts={
            "annotations": Part(("43k_human_train.json", "20k_val.json", "20k_test.json"), "mhan/shot2story", gb=0.14),
            "videos": Part(
                ("release_134k_videos.tar.gz.*",), "mhan/shot2story-videos", gb=160.0, kind="model", folder="videos"
            ),
        },
        steps=(
            "the videos are gated: accept the conditions on their page, then `hf auth login`",
            "cat videos/release_134k_videos.tar.gz.* | tar -xz -C videos        (one archive in parts, 160 GB more)",
            "python tools/convert/shot2story.py {root}/Shot2Story/43k_human_train.json --root {root} "
            "--videos Shot2Story/videos --output {root}/Shot2Story/train.jsonl",
        ),
    ),
    "vist": DataSet(
        page="https://visionandlanguage.net/VIST/dataset.html",
        source='{ format = "story", path = "VIST/train.jsonl" }',
        steps=(
            "from the set's page: Stories of Images-in-Sequence (SIS) into sis/, and the images into images/",
            "python tools/convert/vist.py {root}/VIST/sis/train.story-in-sequence.json --root {root} "
            "--media VIST/images --output {root}/VIST/train.jsonl",
        ),
    ),
    "activitynet-qa": DataSet(
        page="https://huggingface.co/datasets/lmms-eval/ActivityNetQA",
        licence="MIT, for non-commercial use; ActivityNet's videos: see http://activity-net.org",
        benchmarks=("activitynet_qa",),
        parts={
            "questions": Part(("data/*",), "lmms-eval/ActivityNetQA", gb=0.001),
            "videos": Part(("videos_chunked_*.zip",), "lmms-eval/ActivityNetQA"),
        },
        steps=('for part in *.zip; do unzip -n "$part" && rm "$part"; done        (gives all_test/)',),
    ),
    "egoschema": DataSet(
        page="https://huggingface.co/datasets/lmms-eval/egoschema",
        licence="MIT for the questions; the videos are Ego4D's: https://ego4d-data.org",
        benchmarks=("egoschema",),
        parts={
            "questions": Part(("Subset/*", "GENERATION/*"), "lmms-eval/egoschema", gb=0.002),
            "videos": Part(("videos_chunked_*.zip",), "lmms-eval/egoschema", gb=106.0),
        },
        steps=('for part in *.zip; do unzip -n "$part" && rm "$part"; done',),
    ),
    "longvideobench": DataSet(
        page="https://huggingface.co/datasets/longvideobench/LongVideoBench",
        licence="CC BY-NC-SA 4.0; gated: accept its conditions on its page, then `hf auth login`",
        benchmarks=("longvideobench",),
        parts={
            "questions": Part(("*.json",), "longvideobench/LongVideoBench", gb=0.006),
            "videos": Part(("videos.tar.part.*",), "longvideobench/LongVideoBench", gb=162.0),
        },
        steps=("cat videos.tar.part.* | tar -x        (one archive in parts, 162 GB more)",),
    ),
    "mlvu": DataSet(
        page="https://huggingface.co/datasets/MLVU/MVLU",
        licence="CC BY-NC-SA 4.0, for research alone",
        benchmarks=("mlvu",),
        parts={
            "questions": Part(("MLVU/json/*.json",), "MLVU/MVLU", gb=0.002),
            "videos": Part(tuple(f"MLVU/video/{number}_*" for number in range(1, 8)), "MLVU/MVLU"),
        },
    ),
    "msrvtt": DataSet(
        page="https://huggingface.co/datasets/AlexZigma/msr-vtt",
        benchmarks=("msrvtt",),
        parts={
            "captions": Part(("data/test_videodatainfo.json.zip",), "AlexZigma/msr-vtt", gb=0.001),
            "videos": Part(("data/test_videos.zip",), "AlexZigma/msr-vtt", gb=2.0),
        },
        steps=('for part in data/test_*.zip; do unzip -n "$part" && rm "$part"; done        (gives TestVideo/)',),
    ),
    "msvd": DataSet(
        page="https://huggingface.co/datasets/VLM2Vec/MSVD",
        benchmarks=("msvd",),
        parts={
            "captions": Part(("msvd_test.json",), "VLM2Vec/MSVD", gb=0.001),
            "videos": Part(("raw_videos/*",), "VLM2Vec/MSVD"),
        },
    ),
    "mvbench": DataSet(
        page="https://huggingface.co/datasets/OpenGVLab/MVBench",
        licence="MIT for the questions; the videos belong to their owners, for academic research alone; gated: "
        "accept its conditions on its page, then `hf auth login`",
        benchmarks=("mvbench",),
        parts={
            "questions": Part(("json/*.json",), "OpenGVLab/MVBench"),
            "videos": Part(("video/*",), "OpenGVLab/MVBench"),
        },
        steps=(
            'for part in video/*.zip; do unzip -n "$part" -d video && rm "$part"; done',
            "the videos of NTU RGB+D (200 questions) have to be asked for; the set's page says how",
        ),
    ),
    "nextqa": DataSet(
        page=f"https://huggingface.co/datasets/{NEXTQA}",
        benchmarks=("nextqa", "nextqa_oe"),
        parts={
            "questions": Part(("MC/*", "OE/*"), NEXTQA, gb=0.005),
            "videos": Part(("videos.zip",), NEXTQA, gb=6.5),
        },
        steps=("unzip -n videos.zip && rm videos.zip",),
    ),
    "video_mmmu": DataSet(
        page="https://huggingface.co/datasets/lmms-eval/VideoMMMU",
        licence="the videos belong to their owners; its page asks you to accept conditions",
        benchmarks=("video_mmmu", "video_mmmu_question_only"),
        parts={
            "questions": Part(("*.parquet",), "lmms-eval/VideoMMMU", gb=0.001),
            "videos": Part(("*.zip",), "lmms-eval/VideoMMMU", gb=13.4),
        },
        steps=(
            "log in first: `hf auth login`",
            'for part in *.zip; do unzip -n "$part" && rm "$part"; done',
        ),
    ),
    "perceptiontest": DataSet(
        page="https://huggingface.co/datasets/lmms-eval/PerceptionTest_Val",
        licence="CC BY 4.0",
        benchmarks=("perceptiontest",),
        parts={
            "questions": Part(("mc_question_val/*",), "lmms-eval/PerceptionTest_Val", gb=0.001),
            "videos": Part(("videos_chunked_*.zip",), "lmms-eval/PerceptionTest_Val", gb=75.0),
            "test": Part(
                ("mc_question/*", "test_videos.zip"), "lmms-eval/PerceptionTest", gb=45.0, folder="../PerceptionTest"
            ),
        },
        steps=('for part in *.zip; do unzip -n "$part" && rm "$part"; done        (and so in ../PerceptionTest)',),
    ),
    "tempcompass": DataSet(
        page="https://huggingface.co/datasets/lmms-eval/TempCompass",
        licence="CC BY-NC 4.0, for academic research alone",
        benchmarks=("tempcompass",),
        parts={
            "questions": Part(("*/test-*.parquet",), "lmms-eval/TempCompass", gb=0.001),
            "videos": Part(("tempcompass_videos.zip",), "lmms-eval/TempCompass", gb=0.42),
        },
        steps=("unzip -n tempcompass_videos.zip && rm tempcompass_videos.zip",),
    ),
    "vatex": DataSet(
        page="https://huggingface.co/datasets/lmms-eval/VATEX",
        licence="CC BY 4.0 for the captions; the videos belong to their owners",
        benchmarks=("vatex",),
        parts={
            "captions": Part(("vatex_test/*",), "lmms-eval/VATEX", gb=0.002),
            "videos": Part(("*.zip",), "lmms-eval/VATEX"),
        },
        steps=('for part in *.zip; do unzip -n -j "$part" -d videos && rm "$part"; done',),
    ),
    "videochatgpt": DataSet(
        page="https://huggingface.co/datasets/lmms-eval/VideoChatGPT",
        licence="MIT for the questions; ActivityNet's videos: see http://activity-net.org",
        benchmarks=("videochatgpt",),
        parts={
            "questions": Part(("Generic/*", "Temporal/*", "Consistency/*"), "lmms-eval/VideoChatGPT", gb=0.001),
            "videos": Part(("videos.zip",), "lmms-eval/VideoChatGPT", gb=11.3),
        },
        steps=("unzip -n videos.zip && rm videos.zip        (gives Test_Videos/)",),
    ),
    "youcook2": DataSet(
        page="https://huggingface.co/datasets/lmms-eval/YouCook2",
        benchmarks=("youcook2",),
        parts={
            "captions": Part(("data/*",), "lmms-eval/YouCook2", gb=0.001),
            "videos": Part(("YouCookIIVideos.zip",), "lmms-eval/YouCook2", gb=7.4),
        },
        steps=("unzip -n YouCookIIVideos.zip && rm YouCookIIVideos.zip",),
    ),
}
