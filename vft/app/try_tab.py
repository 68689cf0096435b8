"""The tab Try: ask a model about clips, beside its base, and see what it sees."""

from __future__ import annotations

import html
import re
import shlex
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from vft.app.models import Held, Session, as_side, ask, sampling_of, talk_with
from vft.app.parts import Shared, told
from vft.app.workspace import Workspace
from vft.cli.predict import DEFAULT_PROMPT, with_options
from vft.common.errors import UserError
from vft.common.task import Answer
from vft.config import run as configs
from vft.data.media.errors import MediaError
from vft.data.records.files import RECORD_SUFFIXES
from vft.data.records.paths import PICTURE_SUFFIXES, VIDEO_SUFFIXES
from vft.reporting.run_folder import read_json
from vft.reporting.samples import MediumView, medium_decoded
from vft.training.checkpoint import list_checkpoints

NAMES = {"tuned": "model", "base": "its base, without the adapter"}


def build(shared: Shared) -> None:
    """The tab's components and events."""
    space, tab = shared.space, Try(shared.space, Held())
    session = gr.State(Session())
    with gr.Row():
        adapter = gr.Dropdown(label="adapter", info="or a run's checkpoint", allow_custom_value=True, min_width=220)
        base = gr.Dropdown(label="model", info="folder or hub name", allow_custom_value=True, min_width=220)
        with gr.Column(min_width=220, scale=0):
            is_4_bit = gr.Checkbox(label="in 4 bits (nf4)")
            load = gr.Button("Load", variant="primary")
    status = gr.HTML()
    with gr.Row():
        with gr.Column(min_width=300):
            kinds: Any = sorted(VIDEO_SUFFIXES | PICTURE_SUFFIXES)
            files = gr.File(label="clips or pictures", file_count="multiple", file_types=kinds, height=140)
            typed = gr.Textbox(label="or a path", info="then Enter", lines=1)
            frames = gr.HTML()
        with gr.Column(min_width=300, scale=2):
            both = gr.Checkbox(label="beside its base")
            with gr.Row():
                talks = [
                    gr.Chatbot(
                        label=NAMES[name], render_markdown=False, visible=name == "tuned", height=320, buttons=["copy"]
                    )
                    for name in NAMES
                ]
            text = gr.Textbox(label="question", lines=1, placeholder=DEFAULT_PROMPT)
            with gr.Row():
                asks = gr.Button("Ask", variant="primary", min_width=80)
                stop = gr.Button("Stop", min_width=80)
                anew = gr.Button("New talk", min_width=80)
            with gr.Accordion("how it answers", open=False):
                system = gr.Textbox(label="system text", info="of the talks that begin from now on")
                with gr.Row():
                    temperature = gr.Number(0.0, label="temperature", info="0: greedy", minimum=0, step=0.1)
                    tokens = gr.Number(256, label="most tokens", minimum=1, precision=0)
                    seed = gr.Number(0, label="seed", precision=0)
            with gr.Accordion("how likely are these answers?", open=False):
                options = gr.Textbox(label="answers to the question above, one a line", lines=3)
                weigh = gr.Button("Compare")
                table = gr.HTML()
    gr.on(shared.shown, lambda: choices(space), None, [adapter, base], show_progress="hidden")
    adapter.change(told(lambda name: base_of(space, name)), adapter, base, show_progress="hidden")
    clips = [session, files, typed], [frames, *talks]
    loaded = load.click(
        told(tab.load),
        [session, base, adapter, is_4_bit],
        [status, system, text, options, *talks],
        show_progress_on=status,
    )
    loaded.success(told(tab.take), *clips, show_progress_on=frames)
    gr.on([files.change, typed.submit], told(tab.take), *clips, show_progress_on=frames, trigger_mode="always_last")
    gr.on(
        [asks.click, text.submit],
        told(tab.ask),
        [session, text, both, system, temperature, tokens, seed],
        [text, *talks],
        show_progress="hidden",
    )
    stop.click(tab.stop, session, None)
    gr.on([anew.click, *(talk.clear for talk in talks)], tab.begin, session, talks)
    both.change(lambda session, both: [tab.begin(session)[0], gr.Chatbot([], visible=both)], [session, both], talks)
    weigh.click(told(tab.weigh), [session, text, options, both, system], table)


def choices(space: Workspace) -> list[Any]:
    """What the folders offer now: adapters, of runs the checkpoints too; and models."""
    checkpoints = [one for run in space.runs() for one in list_checkpoints(run / "checkpoints")]
    adapters = [*space.adapters(), *map(space.shown, checkpoints)]
    return [gr.Dropdown(choices=[("none", ""), *adapters]), gr.Dropdown(choices=space.models())]


def base_of(space: Workspace, adapter: str) -> Any:
    """The model that an adapter was trained on, as its file or the settings of its run say."""
    if not adapter or not adapter.strip():
        return gr.skip()
    folder = space.existing(adapter, "adapter")
    for run in (folder, folder.parents[1]):
        if (run / "run.json").is_file():
            return configs.load(run / "config.toml").model.path
    return read_json(folder / "adapter_config.json").get("base_model_name_or_path") or gr.skip()


class Try:
    """What the tab's events do. Each gets the session of its page."""

    def __init__(self, space: Workspace, held: Held) -> None:
        self.space, self.held = space, held
        self.sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    def load(self, session: Session, base: str, adapter: str, is_4_bit: bool) -> list[Any]:
        """What is loaded now, the system text, question and labels of its training, and the talks."""
        choice, replaced = self.held.load(self.space, base or "", adapter or "", is_4_bit)
        is_others = any(one.choice == replaced for one in self.sessions if one is not session)
        self.sessions.add(session)
        if choice != session.choice:
            session.begin()
        about = self.held.about
        session.choice, session.prompt = choice, about.get("prompt") or DEFAULT_PROMPT
        words = ["vft", "chat", "--model", choice.base]
        words += ["--adapter", choice.adapter] if choice.adapter else []
        words += ["--quantize", "nf4"] if choice.is_4_bit else []
        lines = [f"Loaded. In a terminal: <code>{html.escape(shlex.join(words))}</code>"]
        if replaced is not None and is_others:
            lines.append(f"It takes the place of {html.escape(replaced.text)}, which another window was talking with.")
        status, question = f"<p>{'<br>'.join(lines)}</p>", gr.Textbox(placeholder=session.prompt)
        labels = "\n".join(about.get("labels", ()))
        return [status, about.get("system") or "", question, labels or gr.skip(), *session.shown]

    def take(self, session: Session, files: Sequence[str] | None, typed: str) -> list[Any]:
        """Begin anew, about these clips: their frames as the model sees them."""
        session.begin()
        session.media, session.problem = (), ""
        try:
            return self._take(session, files, typed)
        except UserError as error:
            session.problem = str(error)
            raise

    def _take(self, session: Session, files: Sequence[str] | None, typed: str) -> list[Any]:
        names = [name for name in [*(files or []), typed] if name.strip()]
        paths = [self.space.existing(name, "clip") for name in names]
        for path in paths:
            if path.is_dir() or path.suffix.lower() in RECORD_SUFFIXES:
                raise UserError(f"{self.space.shown(path)}: is no video or picture; name one")
        if session.choice is None:
            return ["Load a model: what it sees depends on it." if paths else "", *session.shown]
        with self.held.asked(session.choice) as answerer:
            talk = talk_with(answerer, session, "tuned", sampling_of(answerer, 0, 1, 0), "")
            try:
                talk.about(paths)
                plans = answerer.documents(talk.question(""))[0].media
                how = answerer.encoder.processor, answerer.config
                seen = [answerer.pool.submit(medium_decoded, plan, *how).result() for plan in plans]
                if problem := next((one.problem for one in seen if one.problem), None):
                    raise UserError(problem)
            except (MediaError, UserError) as error:
                uploads = re.escape(str(self.space.own / "uploads"))
                raise UserError(re.sub(rf"{uploads}/[^/]*/", "", str(error))) from None
            session.media = talk.media
        return ["".join(map(filmstrip, seen)), *session.shown]

    def ask(self, session: Session, text: str, both: bool, system: str, *how: Any) -> Iterator[list[Any]]:
        """Both talks, while the answers are written; the question's box is emptied."""
        text = text.strip() or session.prompt
        check_clips(session)
        for _ in ask(self.held, session, sides(session, both), text, system, *how):
            yield ["", *session.shown]

    def stop(self, session: Session) -> None:
        """End the answer that is being written."""
        session.is_stopping = True

    def begin(self, session: Session) -> list[Any]:
        """Forget the talks, but not the clips."""
        session.begin()
        return session.shown

    def weigh(self, session: Session, text: str, options: str, both: bool, system: str) -> str:
        """A table of how likely each option is as the next answer, of both sides."""
        wanted = list(dict.fromkeys(line.strip() for line in options.splitlines() if line.strip()))
        if len(wanted) < 2:
            raise UserError("answers: give two or more, one a line, to compare their likelihoods")
        text = text.strip() or session.prompt
        check_clips(session)
        with self.held.asked(session.choice) as answerer:
            answers = {}
            for name in sides(session, both):
                with as_side(answerer, name):
                    talk = talk_with(answerer, session, name, sampling_of(answerer, 0, 1, 0), system)
                    answers[name] = talk.weigh(text, wanted)
        return f"<p>{html.escape(text)}</p>" + "".join(likelihoods(NAMES[name], one) for name, one in answers.items())


def check_clips(session: Session) -> None:
    """UserError if clips were chosen that can't be used."""
    if session.problem:
        raise UserError(f"{session.problem}; choose another clip, or none, and ask again")


def sides(session: Session, both: bool) -> list[str]:
    """Who is asked."""
    return ["tuned", "base"] if both and session.choice and session.choice.adapter else ["tuned"]


def likelihoods(name: str, answer: Answer) -> str:
    """A table, the likeliest option first. By length (`acc_norm`) a long answer isn't less likely for that alone."""
    by_length = replace(answer, option_scores=answer.option_scores_norm)
    kinds = [(one.option_probabilities, one.option_scores) for one in (answer, by_length)]
    columns = answer.question.prompt.options, *kinds[0], *kinds[1]
    rows = "".join(
        f"<tr><td>{html.escape(option)}<td>{share:.1%}<td>{score:.2f}<td>{share_norm:.1%}<td>{score_norm:.3f}"
        for option, share, score, share_norm, score_norm in sorted(zip(*columns, strict=True), key=lambda row: -row[1])
    )
    head = "<tr><th>answer<th>share<th>ln p<th>share by length<th>ln p a character"
    return f"<div class='wide scores'><table><caption>{html.escape(name)}</caption>{head}{rows}</table></div>"


def filmstrip(seen: MediumView) -> str:
    """Frames with their times, how many tokens they are, and what was lost to fit."""
    frames = "".join(
        f"<figure><img src='{html.escape(url)}' alt=''><figcaption>{html.escape(time)}</figcaption></figure>"
        for url, time in seen.frames
    )
    text = "<br>".join(map(html.escape, [seen.title, *map(with_options, seen.notes)]))
    return f"<p>{text}</p><div class='strip'>{frames}</div>"
