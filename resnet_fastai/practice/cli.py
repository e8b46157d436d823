"""Check, train, stop, go on, measure and predict without opening Python."""
__all__ = ['app', 'Json', 'demo_args', 'Data', 'Labels', 'Encoding', 'ByFolders', 'OnBad', 'Precision', 'Balance', 'Schedule', 'Split',
           'Protocol', 'Format', 'limits', 'LogStream', 'plain', 'table', 'answering', 'records', 'main', 'stoppable', 'demo',
           'split', 'check', 'stats', 'resume']

import csv
import glob
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager, redirect_stdout, suppress
from enum import Enum
from inspect import signature
from pathlib import Path
from typing import Annotated, Optional

import typer

from .. import __version__

_epilog = """\b
Exit codes:
  0    all is well
  1    your files or data: a sentence on stderr begins with "error:"; or `check` found something
  2    the command line
  3    `predict`: some photos cannot be read, the others are named (0 in several processes)
  130  stopped by Ctrl-C or SIGTERM; `train`, `resume` and `demo` leave a checkpoint and say how to go on"""

app = typer.Typer(help='Deep residual learning on your own photos: the ResNet paper from a shell.', epilog=_epilog,
                  no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Json = Annotated[bool, typer.Option('--json', help='One JSON document on stdout instead of text')]


def _say_version(asked):
    if not asked: return
    print('resnet-fastai', __version__)
    raise typer.Exit()


@app.callback()
def limits(
    max_pixels: Annotated[Optional[int], typer.Option(min=1, envvar='RESNET_FASTAI_MAX_PIXELS', help='Read photos of up to so many pixels; '
        "without it Pillow's 178,956,970, and JPEGs of twice as many")] = None,
    device: Annotated[Optional[str], typer.Option(help="Where to compute: 'cpu', 'cuda:1' or the index of a GPU; without it the GPU where "
                                                       "there is one")] = None,
    version: Annotated[bool, typer.Option('--version', is_eager=True, callback=_say_version, help='The version, and no more')] = False,
):
    "Deep residual learning on your own photos: the ResNet paper from a shell."
    if max_pixels:
        from PIL import Image
        Image.MAX_IMAGE_PIXELS = -(-max_pixels//2)            # Pillow refuses at twice this
    if device:
        from resnet_fastai.engine.device import use_device
        try: use_device(device)
        except ValueError as e: _end(f'error: {e}', 1)


class LogStream:
    "A stream into a file or a pipe: whole lines, each at once, and no bars"
    def __init__(self,
        to, # A text stream
    ): self.to,self.line = to,''

    def write(self, text:str):
        before,cr,after = text.replace('\r\n', '\n').rpartition('\r')
        if cr: self.line,after = '',after if '\n' in after else ''
        *lines,self.line = (self.line + after).split('\n')
        if lines: self.to.write(''.join(f'{line}\n' for line in lines)); self.to.flush()
        return len(text)

    def flush(self): pass
    def isatty(self): return False


def plain(
    text, # Anything; its `str` is shown
) -> str: # Every character of it can be printed
    "A text on one line: what cannot be printed is escaped"
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))


def table(
    rows:list, # Dicts with the same keys
) -> str: # A line for the names, and a line a row
    "Rows as columns of text; numbers to the right"
    lines = [list(rows[0]), *([plain('' if v is None else v) for v in r.values()] for r in rows)] if rows else []
    wide = [max(map(len, column)) for column in zip(*lines)]
    number = lambda v: str(v)[:1] in set('+-0123456789') and str(v).rstrip('%')[-1:].isdigit()
    right = [all(map(number, column)) for column in zip(*(r.values() for r in rows))]
    return '\n'.join('  '.join(c.rjust(w) if r else c.ljust(w) for c,w,r in zip(line, wide, right)).rstrip() for line in lines)


def _end(text, code):
    print(('\r\x1b[K' if sys.stderr.isatty() else '') + plain(text), file=sys.stderr)           # over a bar that broke off
    raise typer.Exit(code) from None


@contextmanager
def _at_sigterm(do):
    "What SIGTERM does meanwhile"
    mine = threading.current_thread() is threading.main_thread()
    old = signal.signal(signal.SIGTERM, do) if mine else None
    try: yield
    finally:
        if mine: signal.signal(signal.SIGTERM, old)


def _rank(): return int(os.environ.get('RANK', 0))

@contextmanager
def answering(
    as_json:bool, # The answer as JSON?
    log:bool=False, # Does progress belong to the answer's text?
): # Yields answer(obj, text), which prints one of them
    "Print the answer to stdout and the rest to stderr; end with a sentence and an exit code where there is none"
    out, aside = sys.stdout, sys.stdout if log and not as_json else sys.stderr
    if _rank(): out = aside = open(os.devnull, 'w')           # of several processes, the first one speaks
    def answer(obj, text): print(json.dumps(obj, indent=1, default=str) if as_json else text, file=out, flush=True)
    try:
        with _at_sigterm(signal.default_int_handler), redirect_stdout(aside if aside.isatty() else LogStream(aside)): yield answer
    except KeyboardInterrupt as e: _end(e if e.args else 'stopped', 130)
    except BrokenPipeError: raise                             # `| head` has seen enough
    except OSError as e: _end(f"error: {f'{e.filename}: ' if e.filename else ''}{e.strerror or e}", 1)
    except ValueError as e: _end(f'error: {e}', 1)            # as a `DataError` is
    except RuntimeError as e:
        if 'out of memory' not in str(e): raise
        _end(f'error: {str(e).splitlines()[0]} A smaller --micro-bs gives the same updates and needs less', 1)


def records(
    df, # A DataFrame
) -> list: # Dicts that JSON can hold
    "The rows of a table"
    return df.astype(object).where(df.notna(), None).to_dict('records')


def main(
    args:list|None=None, # Words; None: those of the command line
):
    "The command `resnet-fastai`"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'): stream.reconfigure(errors='backslashreplace')
    app(args, prog_name='resnet-fastai')


@contextmanager
def stoppable(
    learn, # With a `Checkpoint`
    go_on:str, # The command that goes on
):
    "End the update at Ctrl-C or SIGTERM, leave a checkpoint, and say how to go on"
    asked = []
    def stop(*_):
        if asked: raise KeyboardInterrupt                     # the second time, at once; `stopping` may come from another process
        asked.append(True)
        learn.stopping = True
    try:
        with _at_sigterm(stop): yield
        if asked: raise KeyboardInterrupt                     # in a background job, which Ctrl-C does not reach, the fit just ends
    except KeyboardInterrupt:
        newest = learn.checkpoint.newest()
        raise KeyboardInterrupt(f"stopped; {newest} holds the run; go on with: {go_on}" if newest else
                                f"stopped before there was a checkpoint; begin again with: {go_on}") from None

demo_args = dict(size=64, bs=16, patience=1, min_delta=.1, num_workers=0, net_args=dict(zero_init_residual=True))


def _on_stop(folder):
    "A `Checkpoint` that is written when the run is stopped, and only then"
    from resnet_fastai.training import Checkpoint
    class OnStop(Checkpoint):
        name = 'checkpoint'
        def save(self, *args): return super().save(*args) if self.stopping else None
    return OnStop(folder)


def _forget(folder):
    "Remove what `_on_stop` has left"
    for p in (*folder.glob('checkpoint-*.pt'), *(folder/name for name in ('best.pt', 'history.csv', 'resumes.csv'))):
        p.unlink(missing_ok=True)
    with suppress(OSError): folder.rmdir()


@app.command(short_help='draw photos, train on them, predict: does it work here?')
def demo(
    folder: Annotated[Path, typer.Argument(help='Where photos, pictures and model go')] = Path('runs/demo'),
    epochs: Annotated[int, typer.Option(min=1, help='Passes over the training photos')] = 12,
    arch: Annotated[str, typer.Option(help='The network')] = 'resnet50',
    as_json: Json = False,
):
    "Draw photos, train a ResNet-50 on them, and predict with 50 crops: a few minutes on a CPU.\n\nExample: resnet-fastai demo"
    with answering(as_json, log=True) as answer:
        from resnet_fastai.core import ResNet
        from resnet_fastai.data import demo_data
        from resnet_fastai.engine.files import DataError
        from resnet_fastai.inference import evaluate
        from resnet_fastai.training import plot_history
        if folder.exists() and not (folder/'photos'/'encoding.json').exists() and any(p.name[0] != '.' for p in folder.iterdir()):
            raise DataError(f'{folder} holds other things than a demo; name a new folder')
        model = ResNet(*demo_data(folder/'photos'), arch=arch, **demo_args, cbs=_on_stop(folder/'stopped'))
        with stoppable(model.learn, f'resnet-fastai demo {shlex.quote(str(folder))} --epochs {epochs} --arch {arch}'):
            model.fit(epochs, resume=True)
        model.save(folder/'model', overwrite=True)
        _forget(folder/'stopped')
        test = model.learn.dls.photos['test']
        plot_history(model.history).savefig(folder/'curves.png', dpi=120)
        model.show_prediction(test[:8], n=3).savefig(folder/'predictions.png', dpi=120)
        right = 1 - evaluate(model, protocol='50crop').top1_error[0]
        answer(dict(model=folder/'model', photos=len(test), top1=right, history=records(model.history)),
               f'50-crop top-1 on {len(test)} test photos: {right:.1%} right (chance {1/len(model.labels):.1%})\n'
               f'look at {folder}/curves.png and {folder}/predictions.png; the model is in {folder}/model')

Data = Annotated[str, typer.Argument(help='Folder with train/ and val/, or its shards, or the URL of an archive or of shards')]
Labels = Annotated[Optional[Path], typer.Argument(help='JSON {image id: label}')]
Encoding = Annotated[Optional[Path], typer.Argument(help='JSON {label: index}')]
ByFolders = Annotated[bool, typer.Option('--folders', help='The photos lie in SPLIT/CLASS/ or in CLASS/; no label files')]


@contextmanager
def _labelled(data_path, files, folders):
    "(photos, labels, encoding) as named, or of class folders: then links to the photos, for the time being"
    if folders == (None not in files) or folders and any(files):
        raise typer.BadParameter('name DATA_PATH and the label files; or DATA_PATH and --folders')
    if not folders: yield data_path, *files; return
    from resnet_fastai.data import from_folders
    from resnet_fastai.engine.files import DataError
    with tempfile.TemporaryDirectory() as tmp:
        links = Path(tmp)/'data'
        try: yield from_folders(data_path, links)
        except DataError as e: raise DataError(_behind_links(str(e), links, data_path)) from None


def _behind_links(text, links, source):
    "A message about links, which are soon gone, as one about the photos behind them"
    for p in links.rglob('*'):
        if str(p) not in text or p.is_dir(): continue
        text = text.replace(str(p), str(next((q for q in Path(source).rglob(glob.escape(p.name)) if q.samefile(p)), p)))
    return text.replace(str(links), str(source))


def _refuse_model(to):
    "Say before anything is measured that a folder cannot take the model"
    from resnet_fastai.engine.files import DataError
    if to and any((to/name).exists() for name in ('config.json', 'model.safetensors')):
        raise DataError(f'{to} holds a model already; name a new folder with --to')


@app.command(short_help='draw validation photos from a heap that has none')
def split(
    source: Annotated[str, typer.Argument(help='Folder of class folders, or an archive or URL of one; or a CSV of photos and labels')],
    dest: Annotated[Path, typer.Argument(help='A new folder; the photos are linked')],
    val: Annotated[float, typer.Option(help='Share of the validation photos of every class')] = .2,
    test: Annotated[float, typer.Option(help='Share of the test photos of every class')] = 0,
    group: Annotated[Optional[str], typer.Option(help='What must stay in one split: a column of the CSV, or a regular expression on the '
                                                      'names, like "scene[0-9]+"')] = None,
    folds: Annotated[Optional[int], typer.Option(help='So many layouts, DEST/fold1 and so on, for a cross-validation')] = None,
    seed: Annotated[int, typer.Option(help='The same seed draws the same photos')] = 42,
    as_json: Json = False,
):
    """Draw validation and test photos, the same share of every class. Copies of a photo, and groups, stay in one split.

    Example: resnet-fastai split heap photos --test .1 --group 'scene[0-9]+'"""
    with answering(as_json) as answer:
        from resnet_fastai.data import from_folders
        from resnet_fastai.practice.tables import from_csv
        draw = from_csv if source.lower().endswith(('.csv', '.tsv')) else from_folders
        found = draw(source, dest, val=val, test=test, seed=seed, group=group, folds=folds)
        found = [found] if folds is None else found
        answer([f._asdict() for f in found], '\n'.join(' '.join(map(plain, f)) for f in found))

@app.command(short_help='read every photo and match every label before training does')
def check(data_path: Data, label_path: Labels = None, label_encoding: Encoding = None, folders: ByFolders = False,
          as_json: Json = False):
    """Read every photo, match every label, and list what is wrong; exit code 1 if anything is.

    Example: resnet-fastai check photos labels.json encoding.json"""
    with answering(as_json) as answer, _labelled(data_path, (label_path, label_encoding), folders) as paths:
        from resnet_fastai.practice.prepare import check_data
        found = records(check_data(*paths))
        answer(dict(problems=found), table(found) or 'nothing is wrong')
        if found: raise typer.Exit(1)


def _colors(found):
    "`ColorStats` as a table, a line an axis"
    axes = [dict(axis=k + 1, variance=f'{v:.5f}', **{c: f'{x:+.3f}' for c,x in zip('RGB', axis)})
            for k,(v,axis) in enumerate(zip(found.eigval, found.eigvec.T))]
    return f"{found.n_photos:,} photos, mean of R, G, B: {', '.join(f'{m:.4f}' for m in found.mean)}\n{table(axes)}"


@app.command(short_help='the colours of a training set')
def stats(
    data_path: Annotated[str, typer.Argument(help='Folder with train/, or any folder of photos, or the URL of an archive')],
    save: Annotated[Optional[Path], typer.Option(help='A new file for them, which `train --stats` takes')] = None,
    as_json: Json = False,
):
    """Mean, variances and axes of the colours of the training photos, RGB from 0 to 1, over all pixels.

    Example: resnet-fastai stats photos --save stats.json"""
    with answering(as_json) as answer:
        from resnet_fastai.augment import ColorStats
        from resnet_fastai.data import resolve_data
        from resnet_fastai.engine.files import DataError
        from resnet_fastai.engine.layout import training_photos
        if save and save.exists(): raise DataError(f'{save} exists already; name a new file with --save')
        if save and not save.parent.is_dir():
            raise DataError(f'{save.parent} is not a folder; name a file in a folder that exists with --save')
        found = ColorStats.fit(training_photos(resolve_data(data_path)))
        if save and not _rank(): found.save(save)
        answer(found.as_dict(), _colors(found))


def _is_of(model, run):
    "Did this run write this model?"
    from resnet_fastai.engine.files import read_json_object
    try:
        with open(run/'history.csv', newline='', encoding='utf-8') as f: first = next(csv.DictReader(f))
        return read_json_object(model/'config.json')['history']['seconds'][0] == float(first['seconds'])
    except (OSError, ValueError, LookupError, TypeError, StopIteration): return False


def _refuse_taken(model, run):
    from resnet_fastai.engine.files import DataError
    holds = 'a model' if any((model/name).exists() for name in ('config.json', 'model.safetensors')) else 'other things'
    if not model.name or (model.exists() and not model.is_dir()): raise DataError(f'{model} cannot be a new folder; name one with --model')
    if model.exists() and any(model.iterdir()) and not _is_of(model, run):
        raise DataError(f'{model} holds {holds} already; name a new folder with --model')


def _save(net, model):
    "Put a model in its place, the first one all at once"
    if _rank(): return                                        # of several processes, one writes
    if model.exists() and any(model.iterdir()): return net.save(model, overwrite=True)
    net.save(part := model.with_name(f'.{model.name}.part'), overwrite=True)
    if model.exists(): model.rmdir()                          # Windows replaces no folder
    part.replace(model)

_paths, _elsewhere = ('data_path', 'label_path', 'label_encoding', 'model', 'stats'), ('run', 'folders', 'as_json')
_newer = 'balance', 'label_smoothing', 'mixup', 'cutmix', 'ema', 'early_stopping', 'restore_best'       # older runs do not know them


def _kept(params):
    "What `args.json` holds of a command's parameters"
    path = lambda k,v: '://' not in str(v) if k in _paths else k == 'weights' and os.path.exists(v)      # 'imagenet' is no path
    whole = lambda k,v: os.path.abspath(v) if v is not None and path(k, v) else v
    return {k: whole(k, getattr(v, 'value', v)) for k,v in params.items() if k not in _elsewhere}


def _near(path):
    "A path as seen from here"
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _read_args(run):
    from resnet_fastai.engine.files import DataError, read_json_object
    if not (run/'args.json').exists(): raise DataError(f'{run} holds no run: it has no args.json; name the folder that `train` told of')
    known = {k: p.default for k,p in signature(_train).parameters.items() if k not in ('ctx', *_elsewhere)}
    args = {k: known[k] for k in _newer} | read_json_object(run/'args.json')
    if odd := {*known} ^ {*args}: raise DataError(f"{run/'args.json'} is not as `train` wrote it: {', '.join(sorted(odd))}")
    return args


def _ready(args, run):
    "The `ResNet` that a run's arguments describe"
    from resnet_fastai.augment import ColorStats
    from resnet_fastai.core import ResNet
    apart = ('schedule', 'plateau'), ('schedule', 'fine_tune')
    args = {k: v for k,v in args.items() if v is not None and k not in ('model', 'epochs', 'restore_best') and (k, v) not in apart}
    if 'stats' in args: args['stats'] = ColorStats.load(args['stats'])
    return ResNet(**args, run_folder=run)


def _fit(net, args, run, answer):
    "Train to the end and save the model"
    go_on, model = f'resnet-fastai resume {shlex.quote(str(run))}', Path(args['model'])
    print(f'the run is kept in {plain(run)}; if it stops, go on with: {plain(go_on)}')
    tuned = (args.get('schedule') or ('fine_tune' if args.get('weights') else 'plateau')) == 'fine_tune'
    with stoppable(net.learn, go_on): (net.fine_tune if tuned else net.fit)(args['epochs'], resume=True, restore_best=args['restore_best'])
    with stoppable(net.learn, go_on): _save(net, model)
    said, obj = f'saved in {plain(_near(model))} after {len(net.history)} epochs', dict(model=model, run=run, history=records(net.history))
    if not args.get('balance'): return answer(obj, said)
    classes = records(net.learn.balance.table)
    answer(obj | dict(classes=classes), f'{table([_class_shown(c) for c in classes])}\n{said}')

def _class_shown(row):
    "A row of what `--balance` did, as people read it"
    return row | {k: f'{row[k]:{how}}' for k,how in dict(share='.1%', turns='.2f', weight='.2f', error='.1%').items()
                  if row.get(k) is not None}

OnBad = Enum('OnBad', dict(error='error', skip='skip'), type=str)
Precision = Enum('Precision', dict(fp32='fp32', bf16='bf16', fp16='fp16'), type=str)
Balance = Enum('Balance', dict(sampler='sampler', loss='loss'), type=str)
Schedule = Enum('Schedule', dict(plateau='plateau', one_cycle='one_cycle', fine_tune='fine_tune'), type=str)
Augment = Enum('Augment', dict(paper='paper', wide='wide'), type=str)


# Options of `train` whose help takes more than a line
_Folders = Annotated[bool, typer.Option('--folders', help=
    'The photos lie in train/CLASS/ and val/CLASS/, or in CLASS/ alone, and a fifth is drawn for validation; no label files')]
_Weights = Annotated[Optional[str], typer.Option(help=
    "What to start from: imagenet, a Hugging Face name like timm/resnet50.a1_in1k, a file, a saved model's folder; without it "
    'drawn anew')]
_Arch = Annotated[Optional[str], typer.Option(help=
    'The network: resnet18 to resnet152, plain34, cifar_resnet20 …; without it that of the weights, or resnet50')]
_NOut = Annotated[Optional[int], typer.Option(min=1, help=
    "Outputs of the network, more than the largest index; without it ImageNet's 1000, or with --weights as few as will do")]
_Augment = Annotated[Augment, typer.Option(help=
    "Crops: the paper's, or wide ones that see most of the photo, where the object fills it")]
_Lr = Annotated[Optional[float], typer.Option(min=0, help=
    'Initial rate; without it .1 at 256 photos in an update, and in proportion')]
_Schedule = Annotated[Optional[Schedule], typer.Option(help=
    'How the rate moves: plateau, one_cycle, or fine_tune: an epoch of the head alone, then --epochs of all layers; without '
    'it fine_tune with --weights, plateau otherwise')]
_Precision = Annotated[Optional[Precision], typer.Option(help=
    'Of the convolutions; without it bf16 where the hardware computes in it, fp32 elsewhere')]
_Balance = Annotated[Optional[Balance], typer.Option(help=
    'Small classes count as much as large ones: by as many photos of each in an epoch (sampler), or by weights in the loss; '
    'without it each photo counts')]
_LabelSmoothing = Annotated[Optional[float], typer.Option(min=0, help=
    'Share of each target that is spread over all labels, such as .1')]
_Ema = Annotated[Optional[float], typer.Option(min=0, help=
    'Average the weights with this decay, such as .999; the average is validated and saved')]
_EarlyStopping = Annotated[Optional[int], typer.Option(min=1, help=
    'Epochs without a better validation loss after which the training ends')]
_RestoreBest = Annotated[bool, typer.Option('--restore-best', help=
    'Save the weights of the epoch with the smallest validation loss, not the last ones')]
_NumWorkers = Annotated[Optional[int], typer.Option(min=0, help=
    'Processes that load photos; without it as the machine has cores')]


@app.command('train', short_help='train on your photos, save the model')
def _train(
    ctx: typer.Context, data_path: Data,
    model: Annotated[Path, typer.Option(help='A new folder for the trained model')],
    label_path: Annotated[Optional[Path], typer.Argument(help='JSON {image id: label}')] = None,
    label_encoding: Annotated[Optional[Path], typer.Argument(help='JSON {label: index}')] = None,
    run: Annotated[Optional[Path], typer.Option(help='A new folder for checkpoints; without it MODEL-run')] = None,
    folders: _Folders = False,
    epochs: Annotated[int, typer.Option(min=1, help='Passes over the training photos')] = 5,
    weights: _Weights = None,
    arch: _Arch = None,
    n_out: _NOut = None,
    size: Annotated[Optional[int], typer.Option(min=1, help='Side of the crop, pixels; without it that of the weights, or 224')] = None,
    augment: _Augment = 'paper',
    bs: Annotated[Optional[int], typer.Option(min=1, help='Photos in an update; without it 256, or 32 with --weights')] = None,
    micro_bs: Annotated[int, typer.Option(min=1, help='Photos that go through the network at a time; fewer need less memory')] = 32,
    lr: _Lr = None,
    schedule: _Schedule = None,
    patience: Annotated[int, typer.Option(min=0, help='Epochs without a better validation loss before the rate falls')] = 3,
    precision: _Precision = None,
    seed: Annotated[int, typer.Option(help='Fixes every draw')] = 42,
    stats: Annotated[Optional[Path], typer.Option(help="Colours, from `stats --save`; without it the training set's")] = None,
    on_bad: Annotated[OnBad, typer.Option(help='What to do about photos that cannot be read or have no label')] = 'error',
    balance: _Balance = None,
    label_smoothing: _LabelSmoothing = None,
    mixup: Annotated[Optional[float], typer.Option(min=0, help='Blend photos, with this alpha, such as .4')] = None,
    cutmix: Annotated[Optional[float], typer.Option(min=0, help='Cover parts of photos by others, with this alpha, such as 1')] = None,
    ema: _Ema = None,
    early_stopping: _EarlyStopping = None,
    restore_best: _RestoreBest = False,
    num_workers: _NumWorkers = None,
    every: Annotated[Optional[int], typer.Option(min=1, help='A checkpoint after so many updates too, not only after each epoch')] = None,
    keep: Annotated[int, typer.Option(min=1, help='So many of the newest checkpoints stay, and the best')] = 2,
    as_json: Json = False,
):
    """Train on your photos and save the model. What stops it is no loss: `resume` goes on.
    On eight GPUs: torchrun --nproc-per-node 8 -m resnet_fastai train … (the same once more goes on with the run).

    Example: resnet-fastai train photos labels.json encoding.json --model flowers --epochs 90"""
    if folders != (label_encoding is None) or folders != (label_path is None):
        raise typer.BadParameter('name DATA_PATH, LABEL_PATH and LABEL_ENCODING; or DATA_PATH and --folders')
    with answering(as_json, log=True) as answer:
        run = run or model.with_name(f'{model.name}-run')
        net, args = _begin(_kept(ctx.params), run, model, folders)
        _fit(net, args, run, answer)


def _begin(args, run, model, folders):
    "A `ResNet` with a run's folder and its arguments, or nothing at all; of several processes the first one makes the folder"
    from resnet_fastai.engine.files import write_json
    from resnet_fastai.engine.shared import on_rank0
    args, new = on_rank0(lambda: _make_run(args, run, model, folders))
    try:
        net = _ready(args, run)
        precision = net.learn.spec.get('precision', 'fp32')                       # also where the run moves to
        if new and not _rank(): write_json(run/'args.json', args | dict(precision=precision))
    except BaseException:
        if new and not _rank(): _unmake(run)
        raise
    return net, args


def _make_run(args, run, model, folders):
    "(its arguments, is it new?)"
    from resnet_fastai.data import from_folders
    from resnet_fastai.engine.files import DataError, write_json
    _refuse_taken(model, run)
    if (run/'args.json').exists():
        if _several() and _same_run(args, known := _read_args(run)): return known, False       # torchrun starts it once more
        raise DataError(f'{run} holds a run already; go on with: resnet-fastai resume {shlex.quote(str(run))}, or name a new folder with '
                        '--run')
    if run.exists() and (not run.is_dir() or any(run.iterdir())): raise DataError(f'{run} is no empty folder; name a new one with --run')
    try:
        if folders: args = args | _kept(from_folders(args['data_path'], run/'data')._asdict())
        run.mkdir(parents=True, exist_ok=True)
        write_json(run/'args.json', args)                                         # from here on a run that was killed can be resumed
    except BaseException:
        _unmake(run)
        raise
    return args, True


def _several(): return os.environ.get('WORLD_SIZE', '1') != '1'


def _same_run(args, known):
    "Does a command ask for what the run in its folder is? Its precision was chosen then, and class folders became links"
    return all(known[k] == v for k,v in args.items() if k != 'precision' and not (k in _paths[:3] and args['label_path'] is None))


def _unmake(run):
    shutil.rmtree(run/'data', ignore_errors=True)                                # links, of our own
    (run/'args.json').unlink(missing_ok=True)
    with suppress(OSError): run.rmdir()


@app.command(short_help='go on with a run that was stopped, or train on')
def resume(
    run: Annotated[Path, typer.Argument(help='The folder of a run, as `train` told it')],
    epochs: Annotated[Optional[int], typer.Option(min=1, help='Epochs of the whole run; without it as `train` was told')] = None,
    model: Annotated[Optional[Path], typer.Option(help='A new folder for the model; without it as `train` was told')] = None,
    as_json: Json = False,
):
    """Go on exactly where a run was stopped, and save the model at its end; with more --epochs, train on.
    RUN/args.json holds where the photos are; change it there if they have moved.

    Example: resnet-fastai resume flowers-run"""
    with answering(as_json, log=True) as answer:
        from resnet_fastai.engine.files import write_json
        args = _read_args(run)
        args |= {k: v for k,v in _kept(dict(epochs=epochs, model=model)).items() if v is not None}
        _refuse_taken(Path(args['model']), run)
        net = _ready(args, run)
        net.learn.checkpoint.find()                           # or its error, and nothing has been changed
        if not _rank(): write_json(run/'args.json', args)
        _fit(net, args, run, answer)

@app.command('pack', short_help='a folder of photos as a few large tar files, to train from')
def _pack(
    data_path: Annotated[str, typer.Argument(help='Folder with train/ and val/, or of any photos')],
    dest: Annotated[Path, typer.Argument(help='A new folder, or one that an earlier call has begun')],
    shard_mb: Annotated[int, typer.Option(min=1, help='MiB of a tar file at the most')] = 256,
    short_side: Annotated[Optional[int], typer.Option(min=1, help='Resize larger photos to this short side, pixels; without it they stay '
                                                                  'as they are')] = None,
    label_path: Annotated[Optional[Path], typer.Option('--labels',
                                                       help='JSON {image id: label}, for .cls files that other programs read')] = None,
    label_encoding: Annotated[Optional[Path], typer.Option('--encoding', help='JSON {label: index}')] = None,
    as_json: Json = False,
):
    """Pack photos into tar files with an index, which train like the folder. A call that was stopped goes on where it was.

    Example: resnet-fastai pack photos photos-shards"""
    with answering(as_json) as answer:
        from resnet_fastai.engine.shards import Shards
        from resnet_fastai.practice.shards import pack_photos
        pack_photos(data_path, dest, shard_mb, short_side, label_path=label_path, label_encoding=label_encoding)
        found = Shards(dest)
        answer(dict(folder=dest, photos=len(found), shards=len(found.header['shards'])),
               f'{found!r}; check a copy with: sha256sum -c SHA256SUMS')


Split = Enum('Split', dict(train='train', val='val', test='test'), type=str)
Protocol = Enum('Protocol', {'1crop': '1crop', '10crop': '10crop', '50crop': '50crop', 'dense': 'dense'}, type=str)


def _errors_shown(row):
    "A row of `evaluate` as people read it"
    shown = {k: v for k,v in row.items() if k in ('protocol', 'label', 'photos')}
    for k in (1, 5): shown |= {f'top-{k} error': f"{row[f'top{k}_error']:.2%}",
                               f'95 % ({k})': f"{row[f'top{k}_low']:.1%} to {row[f'top{k}_high']:.1%}"}
    if row.get('balanced_error') is not None: shown |= {'balanced error': f"{row['balanced_error']:.2%}"}
    return shown


@app.command('evaluate', short_help="errors by the paper's test protocols")
def _evaluate(
    model: Annotated[Path, typer.Argument(help='Folder of a saved model')],
    data_path: Data, label_path: Labels = None,
    folders: ByFolders = False,
    split: Annotated[Split, typer.Option(help='Which photos')] = 'test',
    protocol: Annotated[Optional[list[Protocol]], typer.Option(help="What the network sees of a photo; may be given several times; "
                                                                    "without it the model's own, 50 crops unless "
                                                                    'it was chosen')] = None,
    per_class: Annotated[bool, typer.Option('--per-class', help='A row a class')] = False,
    as_json: Json = False,
):
    """Top-1 and top-5 error of a model on photos with labels.

    Example: resnet-fastai evaluate flowers photos labels.json --protocol 10crop --protocol 50crop"""
    with answering(as_json) as answer, _labelled(data_path, (label_path,), folders) as (photos, labels, *_):
        from resnet_fastai.core import ResNet
        from resnet_fastai.inference import evaluate
        found = records(evaluate(ResNet.load(model), split.value, [p.value for p in protocol] if protocol else None, per_class=per_class,
                                 data_path=photos, label_path=labels))
        answer(dict(split=split.value, errors=found), table([_errors_shown(row) for row in found]))


def _protocol_shown(row):
    "A row of `choose` as people read it"
    return dict(protocol=row.protocol, photos=row.photos, **{'top-1 error': f'{row.top1_error:.2%}',
                '95 %': f'{row.top1_low:.1%} to {row.top1_high:.1%}', 'log loss': f'{row.log_loss:.4f}', 'crops': row.crops})


@app.command('choose', short_help='which crops to predict with, by the validation photos')
def _choose(
    model: Annotated[Path, typer.Argument(help='Folder of a saved model')],
    data_path: Data, label_path: Labels = None,
    folders: ByFolders = False,
    to: Annotated[Optional[Path], typer.Option(help='A new folder for the model with the best of them; without it they are '
                                                    'only shown')] = None,
    as_json: Json = False,
):
    """Compare 1, 10 and 50 crops and the dense way, at the paper's scales and at those of the training, on the validation photos.

    Example: resnet-fastai choose flowers photos labels.json --to flowers-chosen"""
    with answering(as_json) as answer, _labelled(data_path, (label_path,), folders) as (photos, labels, *_):
        from resnet_fastai.core import ResNet
        _refuse_model(to)
        net = ResNet.load(model)
        rows = net.choose_protocol(data_path=photos, label_path=labels)
        if to: net.save(to)
        lines = [table([_protocol_shown(r) for r in rows.itertuples()])]
        if to: lines.append(f'saved in {plain(_near(to))}')
        answer(dict(protocols=records(rows), model=to), '\n'.join(lines))


def _answers(net, photos, n, to, min_prob=None):
    "Dicts of photo, error, labels, and, where there is a threshold, whether the first label reaches it"
    from resnet_fastai.engine.layout import list_photos, no_photos
    from resnet_fastai.practice.predict_folder import predict_folder
    files = [q for p in photos for q in (list_photos(p) if p.is_dir() else [p])]
    if not files: raise no_photos(photos[0])
    least = net.min_prob if min_prob is None else min_prob
    if len(files) == 1 and not to:
        best = net.predict_n(files[0], n, min_prob=0)
        return [dict(photo=files[0], error=None, labels=_named(sum(best, ()))) | ({} if least is None else dict(sure=best[0][1] >= least))]
    rows = records(predict_folder(net, photos[0] if len(photos) == 1 and photos[0].is_dir() and to else files, to, n, min_prob=min_prob))
    best = lambda r: [] if r['error'] else _named([v for k,v in r.items() if k.startswith(('label_', 'prob_'))])
    return [dict(photo=r['id'], error=r['error'] or None, labels=best(r)) | (dict(sure=r['sure'] == 'yes') if r.get('sure') else {})
            for r in rows]


def _unless_many(code):
    "torchrun takes every exit code but 0 for a crash, and would begin again"
    return code if os.environ.get('WORLD_SIZE', '1') == '1' else 0

def _named(values): return [dict(label=label, prob=prob) for label,prob in zip(values[::2], values[1::2])]


@app.command('predict', short_help='name what is on photos')
def _predict(
    model: Annotated[Path, typer.Argument(help='Folder of a saved model')],
    photos: Annotated[list[Path], typer.Argument(help='Photos, or folders of photos')],
    n: Annotated[int, typer.Option('--n', '-n', min=1, help='How many labels for each photo')] = 1,
    to: Annotated[Optional[Path], typer.Option('--csv', help='A file for the answers: id, label_1, prob_1, …, error; begun, or gone on '
                                                             'with')] = None,
    min_prob: Annotated[Optional[float], typer.Option(min=0, max=1, help='A first label that is less probable is marked "not sure"; '
                                                                         'without it as `calibrate --precision` has found')] = None,
    as_json: Json = False,
):
    """Name what is on photos: a line a label, its probability first: the mean over 50 crops, or the protocol that the model has chosen.

    Example: resnet-fastai predict flowers rose.jpg --n 5"""
    with answering(as_json) as answer:
        from resnet_fastai.core import ResNet
        net = ResNet.load(model)
        found = _answers(net, photos, min(n, len(net.labels)), to, min_prob)
        bad, wide = [f['error'] for f in found if f['error']], max(len(plain(f['photo'])) for f in found)
        for error in bad: print(f'error: {plain(error)}')
        name = lambda f: f"{plain(f['photo']):<{wide}}  " if len(found) > 1 else ''
        lines = [name(f) + f"{o['prob']:.4f}  {plain(o['label'])}" + '  (not sure)'*(not i and f.get('sure') is False)
                 for f in found for i,o in enumerate(f['labels'])]
        if to: lines = [f'{len(found):,} photos in {plain(to)}, {len(bad):,} of which cannot be read']
        if lines or as_json: answer(found, '\n'.join(lines))
        if bad: raise typer.Exit(1 if len(bad) == len(found) else _unless_many(3))

def _calibration_shown(row):
    "A row of `calibrate` as people read it"
    return dict(when=row.when, temperature=f'{row.temperature:.3f}', **{'log loss': f'{row.log_loss:.4f}', 'ECE': f'{row.ece:.1%}',
                'mean confidence': f'{row.confidence:.1%}', 'right': f'{1 - row.top1_error:.1%}'})


@app.command('calibrate', short_help='probabilities that mean what they say, and "not sure"')
def _calibrate(
    model: Annotated[Path, typer.Argument(help='Folder of a saved model')],
    data_path: Data, label_path: Labels = None,
    folders: ByFolders = False,
    split: Annotated[Split, typer.Option(help='Photos that training has not learned from')] = 'val',
    precision: Annotated[Optional[float], typer.Option(min=0, max=1, help='Find the probability below which an answer is "not sure", so '
                                                                          'that this share of the answers is right, such as .95')] = None,
    to: Annotated[Optional[Path], typer.Option(help='A new folder for the model with this temperature and threshold; without it they are '
                                                    'only shown')] = None,
    as_json: Json = False,
):
    """Fit a temperature to photos with labels, and find the threshold for "not sure".

    Example: resnet-fastai calibrate flowers photos labels.json --precision .95 --to flowers-sure"""
    with answering(as_json) as answer, _labelled(data_path, (label_path,), folders) as (photos, labels, *_):
        from resnet_fastai.core import ResNet
        _refuse_model(to)
        net = ResNet.load(model)
        where = dict(split=split.value, data_path=photos, label_path=labels)
        rows = net.calibrate(**where).reset_index(names='when')
        least = None if precision is None else net.threshold(precision, **where).to_dict()
        if to: net.save(to)
        lines = [table([_calibration_shown(r) for r in rows.itertuples()])]
        if least:
            lines.append('not sure below {min_prob:.4f}: {coverage:.1%} of {photos:,.0f} photos get an answer, '
                         '{precision:.1%} of these are right (95 % interval {precision_low:.1%} to {precision_high:.1%})'.format(**least))
        if to: lines.append(f'saved in {plain(_near(to))}')
        answer(dict(calibration=records(rows), threshold=least, model=to), '\n'.join(lines))


Format = Enum('Format', dict(onnx='onnx', torch_export='torch_export'), type=str)


@app.command('export', short_help='a saved model for other programs')
def _export(
    model: Annotated[Path, typer.Argument(help='Folder of a saved model')],
    dest: Annotated[Path, typer.Argument(help='A folder, made if need be')],
    format: Annotated[Format, typer.Option(help='model.onnx, or the model.pt2 of torch.export')] = 'onnx',
    overwrite: Annotated[bool, typer.Option('--overwrite', help='Replace a file that is there')] = False,
    as_json: Json = False,
):
    """Write a saved model in a form that other programs run, without this library.

    Example: resnet-fastai export flowers flowers-onnx"""
    with answering(as_json) as answer:
        from resnet_fastai.core import ResNet
        file = ResNet.load(model).export(dest, format=format.value, overwrite=overwrite)
        answer(dict(file=file, format=format.value), f'written: {plain(file)}')


@app.command('app', short_help='a saved model as a page for a browser')
def _app(
    model: Annotated[Path, typer.Argument(help="Folder of a saved model, or hf:USER/NAME of Hugging Face's hub")],
    port: Annotated[Optional[int], typer.Option(min=0, max=65535, help='Without it 7860, or the next that is free')] = None,
    host: Annotated[str, typer.Option(help='Who can reach the page: 127.0.0.1 this computer, 0.0.0.0 every machine of the '
                                            'network')] = '127.0.0.1',
    examples: Annotated[Optional[Path], typer.Option(help='A folder of photos to begin with')] = None,
    min_prob: Annotated[Optional[float], typer.Option(min=0, max=1, help='Below this probability the page is "not sure"; without it as '
                                                                         '`calibrate --precision` has found')] = None,
    max_photos: Annotated[int, typer.Option(min=1, help='Photos at a time')] = 200,
    max_mb: Annotated[int, typer.Option(min=1, help='Size of a photo, MB')] = 20,
    as_json: Json = False,
):
    """Show a saved model as a page: drop photos, see their labels, the crops that voted and where the evidence lies.
    Needs resnet_fastai[app]. Nothing is sent to anybody else; Ctrl-C ends the page.

    Example: resnet-fastai app flowers"""
    with answering(as_json) as answer:
        from resnet_fastai.core import ResNet
        from resnet_fastai.practice.app import Limits, serve
        tell = lambda url: answer(dict(url=url, model=model), f'open {url} in a browser; Ctrl-C ends the page')
        serve(ResNet.load(model), host, port, examples, min_prob, Limits(max_photos, max_mb), tell)
