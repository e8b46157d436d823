"""A page for a browser: drop photos, see their labels, the crops that voted and where the evidence lies. Sends nothing anywhere."""
import base64
import io
import json
import os
import signal
import socket
import tempfile
import threading
from contextlib import contextmanager
from functools import partial
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..augment import resize_short
from ..engine.batching import batch_size
from ..engine.demo_photos import _textures, draw_photo
from ..engine.files import DataError, PhotoError, cut
from ..engine.layout import list_photos, no_photos, photo_suffixes
from ..engine.photo import open_photo
from ..inference import crop_probs, extract_crops, protocol_boxes
from .look import _heat, require_trained, top_labels
from .predict_folder import _columns, _line, _row
from .share import in_words

local = ('127.0.0.1', 'localhost', '::1')                                       # hosts that nobody but this machine can reach


class Limits(NamedTuple):
    "What the page takes"
    photos: int = 200 # At a time
    megabytes: int = 20 # A photo

    @property
    def sent(self): return 8*self.megabytes << 20                           # bytes that a browser may send; `ask` refuses a file in words


class Answer(NamedTuple):
    "What the model says about one photo"
    name: str # As its file was called
    path: str # Where it lies
    probs: np.ndarray|None # (n_out,) float32; None where the file is no photo
    best: list # [(label, probability)], most likely first
    sure: bool # Is the first label likely enough?
    error: str # Why there is no answer; '' otherwise


class Vote(NamedTuple):
    "What one crop says"
    side: int # Short side of the resized photo that it is cut from, pixels
    crop: np.ndarray # (size,size,3) uint8
    label: str # Its own likeliest
    prob: float # Of that label
    agrees: bool # Is it the photo's label?


# ── What the model says ──────────────────────────────────────────────────────────────────────────────────────────────────────

def known_threshold(
    model, # A `ResNet`
    asked: float|None=None, # The user's own; None: the model's
) -> float: # 0 where nobody has set one
    "The probability below which the page says \"not sure\""
    least = model.min_prob if asked is None else asked
    if least is None: return 0.
    if not 0 <= least <= 1: raise DataError(f"the probability below which the page is not sure is {least!r}; it must be from 0 to 1")
    return float(least)


def ask(
    model, # A `ResNet`
    path: str|Path, # Of a photo
    least: float=0, # Below this probability the page is not sure
    limits: Limits=Limits(),
) -> Answer: # With an error where the file is no photo
    "The labels of one photo"
    name, path = os.path.basename(path), str(path)
    try:
        if os.path.getsize(path) > limits.megabytes << 20:
            raise PhotoError(f"{name!r} is larger than {limits.megabytes} MB, the most that this page takes")
        probs = model.predict(path)
    except (PhotoError, OSError) as e:
        said = f"{name!r} cannot be read: {e.strerror or e}" if isinstance(e, OSError) else str(e).replace(repr(path), repr(name))
        return Answer(name, path, None, [], False, said)
    best = top_labels(probs, model.labels, min(5, len(model.labels)))
    return Answer(name, path, probs, best, best[0][1] >= least, '')


def votes(
    model, # A `ResNet`
    answer: Answer, # About a photo
) -> list: # A `Vote` a crop, in the order in which they are taken; empty where the model reads whole photos
    "The crops that the model predicts with, and what each of them says"
    t, img = require_trained(model), open_photo(answer.path)
    if t.protocol.startswith('dense'): return []
    boxes = protocol_boxes(t.protocol, *img.size, t.size)
    crops = extract_crops(img, boxes, t.size)
    probs = crop_probs(t.net, crops, t.stats, bs=batch_size(t.net, t.size), precision=None).double().numpy()
    tops = [top_labels(p, t.labels, 1)[0] for p in probs]
    pixels = crops.permute(0, 2, 3, 1).numpy()
    return [Vote(box[0], crop, label, p, label == answer.best[0][0]) for box,crop,(label,p) in zip(boxes, pixels, tops)]


def heat(
    model, # A `ResNet`
    answer: Answer, # About a photo
    label: str|None=None, # The label that is asked about; None: the likeliest
    most: int=640, # Longest side, pixels
) -> tuple: # (the grey photo with what speaks for the label in colour, the largest value: 0 where nothing does)
    "Where in a photo the evidence for a label lies"
    from matplotlib import colormaps
    t, img = require_trained(model), open_photo(answer.path)
    map_ = _heat(t, resize_short(img, t.size), answer.best[0][0] if label is None else label)
    img.thumbnail((most, most))
    fine = np.asarray(Image.fromarray(map_.astype(np.float32)).resize(img.size, Image.Resampling.BILINEAR)).clip(0, 1)
    grey, colour = np.asarray(img.convert('L'), float)[...,None], 255*colormaps['inferno'](fine)[...,:3]
    return Image.fromarray((.4*grey + .6*colour).round().astype(np.uint8)), float(map_.max())


def write_csv(
    answers: list, # Of `Answer`
    labels, # The model's `LabelMap`
    folder: str|Path, # Where predictions.csv goes
    least: float=0, # Below this probability the page is not sure
) -> Path:
    "The same table that `resnet-fastai predict --csv` writes"
    known, how = (list(labels.encoding), np.array(list(labels.encoding.values()))), (min(5, len(labels)), least or None)
    rows = [_row(a.name, DataError(a.error) if a.error else a.probs[None], known, *how) for a in answers]
    path = Path(folder)/'predictions.csv'
    path.write_bytes(b''.join(map(_line, [_columns(*how), *rows])))
    return path


def example_photos(
    labels, # The model's `LabelMap`
    folder: str|Path|None=None, # With photos; None: drawn ones, for a model of the drawn textures
    dest: str|Path|None=None, # Where the drawn ones go
    most: int=8,
) -> list: # Of paths
    "Photos to begin with"
    if folder is not None:
        if found := list_photos(folder): return [str(found[i]) for i in np.linspace(0, len(found) - 1, min(most, len(found))).astype(int)]
        raise no_photos(folder)
    if dest is None or not {*labels.encoding} <= {*_textures}: return []
    rng, paths = np.random.default_rng(7), []
    for label in list(labels.encoding)[:most]:
        paths.append(str(Path(dest)/f'{label}.png'))
        draw_photo(label, rng).save(paths[-1])
    return paths


# ── As HTML ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _small(img, side):
    "A copy, its longest side so many pixels at the most"
    img = img.copy()
    img.thumbnail((side, side))
    return img


def _data_url(img, side, quality=80):
    "A picture inside the page"
    _small(img, side).save(out := io.BytesIO(), 'JPEG', quality=quality)
    return 'data:image/jpeg;base64,' + base64.b64encode(out.getvalue()).decode()


def _picture(img, alt, side=640, **kwargs): return f'<img src="{_data_url(img, side, **kwargs)}" alt="{escape(alt)}">'


def _say(label, most=60):
    "A label on one line, as HTML"
    return escape(cut(' '.join(str(label).split()), most))


def _bars(best):
    row = '<tr><th scope="row">{}</th><td class="rf-bar"><div style="width:{:.1f}%"></div></td><td>{:.1%}</td></tr>'
    return f'<table class="rf-bars"><tbody>{"".join(row.format(_say(label), 100*p, p) for label,p in best)}</tbody></table>'


def _box(inner, more=''): return f'<section class="rf-answer {more}"><div>{inner}</div></section>'


def verdict(
    answer: Answer,
    least: float=0, # Below this probability the page is not sure
) -> str: # HTML
    "The photo, its label and the bars"
    if answer.error: return _box(f'<h2>No answer</h2><p>{escape(answer.error)}</p>', 'rf-bad')
    label, p = answer.best[0]
    said = f'<h2>{_say(label)} <small>{p:.1%}</small></h2>'
    if not answer.sure:
        said = (f'<h2 class="rf-unsure">Not sure</h2><p>Perhaps <b>{_say(label)}</b>, with {p:.1%}. '
                f'This page names a label from {least:.0%} on.</p>')
    photo = f'{_picture(open_photo(answer.path), f"the photo {answer.name}")}<figcaption>{_say(answer.name)}</figcaption>'
    return f'<section class="rf-answer"><figure>{photo}</figure><div>{said}{_bars(answer.best)}</div></section>'


def _scale(side, some):
    "The crops of one scale"
    def thumb(v):
        img = _picture(Image.fromarray(v.crop), f'crop: {v.label} {v.prob:.0%}', 72, quality=70)
        return f'<figure class="rf-{["no", "yes"][v.agrees]}">{img}<figcaption>{_say(v.label, 14)}<br>{v.prob:.0%}</figcaption></figure>'
    agree = sum(v.agrees for v in some)
    return f'<h4>Short side {side} pixels: {agree} of {len(some)} agree</h4><div class="rf-crops">{"".join(map(thumb, some))}</div>'


def votes_html(
    found: list, # Of `Vote`
    answer: Answer, # About the same photo
    temperature: float=1, # Of the model
) -> str:
    "The crops in rows, a scale a row: framed in blue where they agree with the photo's label, in orange where not"
    if not found: return '<p class="rf-note">This model reads whole photos, every window of them, so there are no crops to show.</p>'
    label, p = answer.best[0]
    sides, calibrated = list(dict.fromkeys(v.side for v in found)), '' if temperature == 1 else ', calibrated,'
    head = (f'<p>{sum(v.agrees for v in found)} of {len(found)} crops say <b>{_say(label)}</b>; their mean{calibrated} is the answer, '
            f'{p:.1%}. '
            '<span class="rf-key rf-yes">agrees</span> <span class="rf-key rf-no">does not</span></p>')
    return f'<section class="rf-votes">{head}{"".join(_scale(s, [v for v in found if v.side == s]) for s in sides)}</section>'


def heat_html(
    img: Image.Image, # Of `heat`
    strongest: float, # Of `heat`
    label: str,
) -> str:
    "The heat map and how to read it"
    name = f'<b>{_say(label)}</b>'
    what = f'Bright: speaks for {name}. Dark: does not.' if strongest else f'Nothing in this photo speaks for {name}.'
    return f'<figure class="rf-heat">{_picture(img, f"where the evidence for {label} lies")}<figcaption>{what}</figcaption></figure>'


def heading(
    model, # A `ResNet`
    shared: bool=False, # Can other machines reach the page?
    most: int=12, # Labels that are named
) -> str: # HTML
    "What the page is for, and what the model knows"
    t, names = model.trained, list(model.labels.encoding)
    more = f' and {len(names) - most:,} more' if len(names) > most else ''
    stay = 'Photos go to the machine that serves this page, and no further.' if shared else 'Photos stay on this computer.'
    knows = f'This model tells {len(names):,} labels apart: {", ".join(_say(n, 30) for n in names[:most])}{more}.'
    how = f'{escape(t.arch)}; the answer is {escape(in_words(t.protocol, t.size))}.'
    return f'<header class="rf-head"><h1>{title}</h1><p>{knows} {stay}</p><p class="rf-note">{how}</p></header>'


css = '''
.gradio-container {width: 100% !important; max-width: 1180px !important; margin: 0 auto !important} main.app {padding: 1rem !important}
.rf-head h1 {font-size: 1.9rem; margin: .2rem 0; font-weight: 650}
.rf-head p {margin: .2rem 0; max-width: 110ch}
.rf-note {opacity: .75; font-size: .9rem}
.prose h3 {font-size: 1.15rem; margin: 1rem 0 .2rem}
.rf-answer {display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; min-height: 12rem; padding: 1rem;
  border: 1px solid var(--border-color-primary);
  border-radius: 8px; background: var(--block-background-fill)}
.rf-answer > figure {flex: 1 1 190px; max-width: 300px; margin: 0} .rf-answer > div {flex: 2 1 250px; min-width: 0}
.rf-answer figure img {width: 100%; max-height: 300px; object-fit: contain; object-position: left top; border-radius: 6px; margin: 0}
.rf-answer h2 {font-size: 1.7rem; margin: 0 0 .6rem; line-height: 1.2; font-weight: 650; overflow-wrap: anywhere}
.rf-answer h2 small {opacity: .75; font-weight: 400}
.rf-answer .rf-unsure, .rf-bad h2 {color: #b34700} .dark .rf-answer .rf-unsure, .dark .rf-bad h2 {color: #ff9f5a}
figcaption {font-size: .85rem; opacity: .8; overflow-wrap: anywhere}
.rf-answer table.rf-bars {width: 100%; border-collapse: collapse; margin: 0; border: 0 !important}
.rf-answer .rf-bars :is(tr, th, td) {border: 0 !important; background: none !important}
.rf-bars th {text-align: left; font-weight: 400; padding: .2rem .6rem .2rem 0 !important; width: 34%; overflow-wrap: anywhere}
.rf-bars td {padding: .2rem 0 !important; text-align: right; width: 4rem; font-variant-numeric: tabular-nums}
.rf-bars td.rf-bar {width: auto}
.rf-bar div {height: 1.1rem; min-width: 2px; background: #0072B2; border-radius: 3px}
.rf-bars tr:not(:first-child) .rf-bar div {opacity: .55}
.rf-heat {margin: 0} .rf-heat img {width: 100%; max-width: 460px; border-radius: 6px; margin: 0}
.rf-crops {display: grid; grid-template-columns: repeat(10, minmax(0, 1fr)); gap: 5px}
.rf-votes h4 {margin: .7rem 0 .25rem; font-size: .85rem; font-weight: 400; opacity: .8}
.rf-crops figure {margin: 0; text-align: center}
.rf-crops img {width: 100%; max-width: 96px; aspect-ratio: 1; border: 3px solid; border-radius: 4px; margin: 0 auto}
.rf-crops figcaption {font-size: .7rem; line-height: 1.15; opacity: 1}
.rf-yes img {border-color: #0072B2}
.rf-no img {border-color: #D55E00}
.rf-key {border: 3px solid; border-radius: 4px; padding: 0 .4rem; font-size: .8rem; white-space: nowrap}
.rf-key.rf-yes {border-color: #0072B2}
.rf-key.rf-no {border-color: #D55E00}
:is(#examples, #many) .grid-wrap {height: auto !important; min-height: 0 !important}
#many .grid-wrap {max-height: 26rem}
:is(#examples, #many) .grid-wrap {padding: 0}
#examples .grid-container {grid-template-columns: repeat(4, minmax(0, 1fr)) !important} .html-container {padding: 0 !important}
@media (max-width: 640px) {
  .rf-crops {grid-template-columns: repeat(5, minmax(0, 1fr))} .rf-head h1 {font-size: 1.5rem}
  .rf-answer > figure {max-width: none} .rf-answer > div {order: -1}
}
'''

# Larger files stay in the browser: Gradio would say no more than "Error" where they were dropped
_hold_back = '''<script>
for (const kind of ['change', 'drop']) addEventListener(kind, e => {
  if (!e.target.closest?.('#drop')) return;
  const large = [...(e.dataTransfer ?? e.target).files ?? []].filter(f => f.size > SENT).map(f => f.name);
  const box = document.querySelector('#large :is(textarea, input)');
  if (!large.length || !box) return;
  e.preventDefault(); e.stopImmediatePropagation();
  if (kind == 'change') e.target.value = '';
  box.value = JSON.stringify({names: large, at: Date.now()});
  box.dispatchEvent(new Event('input', {bubbles: true}));
}, true);
</script>'''

title = 'What is on your photo?'
_begin = ('<h2>Drop a photo, or several</h2><p>You will see the likeliest labels, where in the photo the evidence lies, '
          'and what each of the crops says that the model looks at.{}</p>')


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _gradio():
    "Gradio without its statistics; they are switched off before it is imported"
    os.environ |= dict(GRADIO_ANALYTICS_ENABLED='False', HF_HUB_DISABLE_TELEMETRY='1', GRADIO_SSR_MODE='False')
    if find_spec('gradio') is None: raise DataError('the page needs Gradio: pip install "resnet_fastai[app]"')
    import gradio
    return gradio


def _thumbnail(answer):
    "A picture of a photo with its label, for the overview of many"
    if answer.error: return Image.new('RGB', (160, 160), '#888'), 'cannot be read'
    img, (label, p) = _small(open_photo(answer.path), 240), answer.best[0]
    return img, f'{cut(str(label), 24)} {p:.0%}' if answer.sure else f'not sure ({cut(str(label), 16)} {p:.0%})'


class Page:
    "The Gradio page of a model: its parts, and what happens when"
    def __init__(self,
        model, # A `ResNet`
        folder: str|Path, # For files that last as long as the page
        examples: list=(), # Paths of photos
        least: float=0, # Below this probability the page is not sure
        limits: Limits=Limits(),
        shared: bool=False, # Can other machines reach the page?
    ):
        self.model, self.folder, self.examples, self.least, self.limits = model, Path(folder), list(examples), least, limits
        self.gr = _gradio()
        self.blocks = self.gr.Blocks(analytics_enabled=False, title=title, delete_cache=(600, 3600))
        with self.blocks:
            self.gr.HTML(heading(model, shared))
            self.found = self.gr.State([])
            self._parts()
            self._events()

    def _parts(self):
        gr, column = self.gr, partial(self.gr.Column, min_width=300)
        photos = partial(gr.Gallery, show_label=False, height='auto', allow_preview=False, interactive=False, buttons=[])
        with gr.Row():
            with column(scale=4):
                self.drop = gr.File(label='Your photos', file_count='multiple', file_types=['image', *sorted(photo_suffixes)], height=150,
                                    elem_id='drop')         # by name too: few systems know HEIC as an image
                self.large = gr.Textbox(visible='hidden', elem_id='large')
                if self.examples:
                    gr.HTML('<h3>Or try one of these</h3>')
                    small = [_small(open_photo(p), 160) for p in self.examples]
                    self.shelf = photos(small, label='Examples', columns=4, elem_id='examples')
            with column(scale=7):
                self.verdict = gr.HTML(self._first(), elem_id='verdict')
                self.many = photos(label='All photos: click one to see more of it', columns=5, visible=False, elem_id='many')
                self.csv = gr.DownloadButton('Download the answers as CSV', visible=False, elem_id='csv', size='sm')
        with gr.Row(visible=False) as self.more:
            with column(scale=4):
                gr.HTML('<h3>Where the evidence lies</h3>')
                self.label = gr.Dropdown([*map(str, self.model.labels.encoding)], label='The evidence for', elem_id='label')
                self.heat = gr.HTML(elem_id='heat')
            with column(scale=7):
                gr.HTML('<h3>The crops that voted</h3>')
                self.votes = gr.HTML(elem_id='votes')

    def _events(self):
        how = dict(concurrency_id='model', concurrency_limit=1, api_visibility='private', show_progress='minimal',
                   trigger_mode='multiple')                                     # a click while it works waits for its turn
        shown = [self.drop, self.found, self.verdict, self.many, self.csv, self.more, self.label, self.heat, self.votes]
        work = [self.drop.upload(self.read, self.drop, shown, show_progress_on=self.verdict, **how)]
        def pick(found, event: self.gr.SelectData): yield from self.select(found, event.index)          # Gradio knows the event by its type
        def example(event: self.gr.SelectData): yield from self.read([self.examples[event.index]])
        work.append(self.many.select(pick, self.found, shown, show_progress_on=self.verdict, **how))
        if self.examples: work.append(self.shelf.select(example, None, shown, show_progress_on=self.verdict, **how))
        self.label.input(self.evidence, [self.found, self.label], self.heat, show_progress_on=self.heat, **how)
        at_once = dict(cancels=work, queue=False, api_visibility='private')
        self.drop.clear(self.reset, None, shown, **at_once)
        self.large.change(self.too_large, self.large, shown, **at_once)

    def _first(self): return _box(_begin.format(' Or click one of the examples.' if self.examples else ''))

    def reset(self):
        "As the page was at first"
        hidden = self.gr.update(visible=False)
        return {self.drop: None, self.found: [], self.verdict: self._first(),
                self.many: hidden | dict(value=[]), self.csv: hidden, self.more: hidden}

    def too_large(self, held_back):
        "Say which files the browser has not sent; it sends none of those beside them either"
        names = [repr(cut(str(n), 60)) for n in json.loads(held_back)['names']]
        more = f' and {len(names) - 3:,} more' if len(names) > 3 else ''
        said = (f'{", ".join(names[:3])}{more}: larger than {self.limits.sent >> 20:,} MB, far more than a photo. '
                'Nothing was read; drop the other photos again, without what is too large.')
        return self.reset() | {self.verdict: _box(f'<h2>Too large</h2><p>{escape(said)}</p>', 'rf-bad')}

    def read(self, files):
        "Answer about photos, one after the other"
        files, most = [str(f) for f in files or []], self.limits.photos
        if not files: yield self.reset(); return
        if len(files) > most:
            said = f'These are {len(files):,}; this page takes {most:,} at a time. For more: resnet-fastai predict MODEL FOLDER --csv FILE'
            yield self.reset() | {self.verdict: _box(f'<h2>Too many photos</h2><p>{said}</p>', 'rf-bad')}
            return
        answers = []
        for i,path in enumerate(files):
            if len(files) > 1:
                yield {self.verdict: _box(f'<h2>Photo {i + 1} of {len(files)}</h2><progress max="{len(files)}" value="{i}"></progress>')}
            answers.append(ask(self.model, path, self.least, self.limits))
        yield from self._all(answers)

    def _all(self, answers):
        "Show the first answer, and the way to the others"
        gr, several = self.gr, len(answers) > 1
        csv = str(write_csv(answers, self.model.labels, tempfile.mkdtemp(dir=self.folder), self.least)) if several else None
        thumbs = [_thumbnail(a) for a in answers] if several else []
        yield {self.drop: None, self.found: [answers, 0], self.verdict: verdict(answers[0], self.least),
               self.more: gr.update(visible=False), self.csv: gr.update(value=csv, visible=several),
               self.many: gr.update(value=thumbs, visible=several)}
        yield from self._details(answers[0])

    def select(self, found, i):
        "Show one of several photos"
        answers = found[0]
        yield {self.found: [answers, i], self.more: self.gr.update(visible=False), self.verdict: verdict(answers[i], self.least)}
        yield from self._details(answers[i])

    def _details(self, answer):
        "First the heat map, then the crops"
        if answer.error: return
        label = answer.best[0][0]
        yield {self.more: self.gr.update(visible=True), self.label: str(label), self.heat: heat_html(*heat(self.model, answer), label),
               self.votes: '<p class="rf-note">The crops are read …</p>'}
        yield {self.votes: votes_html(votes(self.model, answer), answer, self.model.trained.temperature)}

    def evidence(self, found, label):
        "The heat map of another label"
        answers, i = found
        return heat_html(*heat(self.model, answers[i], label), label)


# ── Serving ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

policy = ("default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; form-action 'self'; "
          "base-uri 'self'; object-src 'none'; frame-ancestors 'self'")         # the browser asks no other host, whatever the page says


def _guarded(
    inner, # An ASGI application
):
    "The same with headers that forbid requests to other hosts"
    headers = [(b'content-security-policy', policy.encode()), (b'referrer-policy', b'no-referrer'), (b'x-content-type-options', b'nosniff')]
    async def outer(scope, receive, send):
        async def send_more(message):
            if message['type'] == 'http.response.start': message = message | dict(headers=[*message.get('headers', ()), *headers])
            await send(message)
        await inner(scope, receive, send_more)
    return outer


def web_app(
    page: Page,
    host: str='127.0.0.1', # As for `serve`
): # An ASGI application
    "The page as a program that a web server runs"
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    gr, system = page.gr, ('ui-sans-serif', 'system-ui', 'sans-serif')
    theme = gr.themes.Default(primary_hue='blue', font=system, font_mono=('ui-monospace', 'monospace'))      # fonts that are there
    page.blocks.queue(max_size=20)
    nothing_more = dict(footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False)
    app = gr.mount_gradio_app(FastAPI(openapi_url=None), page.blocks, '/', theme=theme, css=css, show_error=True,
                              allowed_paths=[str(page.folder)], max_file_size=page.limits.sent,
                              head=_hold_back.replace('SENT', str(page.limits.sent)),
                              **nothing_more)
    if host in local: app = TrustedHostMiddleware(app, [*local, '[', '[::1]'])  # a name of somebody else's that leads here is refused
    return _guarded(app)


def bound(
    host: str, # As for `serve`
    port: int|None, # As for `serve`
) -> socket.socket:
    "A socket that waits at the address; a `DataError` where it cannot"
    try: family, _, _, _, at = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as e:
        raise DataError(f"{host!r:.80} is no address of this machine: {e.strerror}; leave --host out, or write 0.0.0.0 "
                        "for all of its addresses") from None
    for p in ([*range(7860, 7880), 0] if port is None else [port]):
        s = socket.socket(family)
        if os.name == 'posix': s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try: s.bind((host, p)); s.listen(128); return s
        except (OSError, OverflowError) as e: s.close(); why = getattr(e, 'strerror', None) or e
    raise DataError(f"the page cannot wait at {host}, port {port}: {why}; name another with --port, or leave it out")


@contextmanager
def _own_folder():
    "A folder for uploaded photos that lasts as long as the page; Gradio is told of it"
    with tempfile.TemporaryDirectory(prefix='resnet-fastai-app-', ignore_cleanup_errors=True) as folder:
        was, os.environ['GRADIO_TEMP_DIR'] = os.environ.get('GRADIO_TEMP_DIR'), str(Path(folder)/'uploads')
        try: yield Path(folder)
        finally:
            del os.environ['GRADIO_TEMP_DIR']
            if was is not None: os.environ['GRADIO_TEMP_DIR'] = was


@contextmanager
def _as_ctrl_c():
    "SIGTERM, and the end of the terminal, do what Ctrl-C does: nothing of what was uploaded stays behind"
    act, old = dict(SIGTERM=signal.default_int_handler, SIGHUP=lambda *_: signal.raise_signal(signal.SIGTERM)), {}
    if threading.current_thread() is threading.main_thread():
        known = {getattr(signal, name): do for name,do in act.items() if hasattr(signal, name)}
        old = {s: signal.signal(s, do) for s,do in known.items() if signal.getsignal(s) is signal.SIG_DFL}
    try: yield
    finally:
        for s,handler in old.items(): signal.signal(s, handler)


def _run(server, s):
    "Serve in a thread until this one is interrupted: a notebook's thread has an event loop of its own already"
    failed = []
    def run():
        try: server.run(sockets=[s])
        except BaseException as e: failed.append(e)
    (thread := threading.Thread(target=run, daemon=True)).start()
    try:
        while thread.is_alive(): thread.join(.5)                      # with a limit, so that Windows sees Ctrl-C
    finally:
        server.should_exit = True
        thread.join()
    if failed: raise failed[0]


def serve(
    model, # A `ResNet` that has been trained
    host: str='127.0.0.1', # Address of this machine; '0.0.0.0': other machines can reach the page
    port: int|None=None, # None: 7860, or the next that is free
    examples: str|Path|None=None, # Folder of photos to begin with; None: drawn ones, for a model of the drawn textures
    min_prob: float|None=None, # Below this probability the page is "not sure"; None: the model's own threshold, if it has one
    limits: Limits=Limits(), # Photos at a time, and their size
    ready=print, # Called with the page's address when it can be opened
):
    "Show a model as a page for a browser, until Ctrl-C or SIGTERM, which end in a `KeyboardInterrupt`"
    import uvicorn
    require_trained(model)
    least = known_threshold(model, min_prob)
    _gradio()
    with _as_ctrl_c(), _own_folder() as folder, bound(host, port) as s:
        shown = example_photos(model.labels, examples, folder)
        page = Page(model, folder, shown, least, limits, shared=host not in local)
        server = uvicorn.Server(uvicorn.Config(web_app(page, host), log_level='warning', timeout_graceful_shutdown=1))
        ready(f"http://{f'[{host}]' if ':' in host else host}:{s.getsockname()[1]}")
        _run(server, s)
