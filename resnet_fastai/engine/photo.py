"""Decode one photo, upright and in RGB, no finer than it is needed."""
import os
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from stat import S_ISDIR, S_ISREG

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import jpeg_factory
from fastai.torch_core import show_image
from simplejpeg import decode_jpeg

from .download import _download, _is_page, shown_url
from .files import DataError, PhotoError


def _to_rgb(img):
    "8 bits of red, green and blue; what was transparent becomes white"
    if img.mode == 'F': raise ValueError("its pixels are 32-bit fractions, whose white nobody knows; save it with 8 or 16 bits")
    if img.mode[0] == 'I':                                             # 16 bits, whichever way they are stored
        deep = np.asarray(img).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535: raise ValueError("its pixels have 32 bits, whose white nobody knows; save it with 8 or 16")
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert('RGB')
    if img.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in img.info:
        img = img.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', img.size, 'white'), img).convert('RGB')
    return img.convert('RGB')


class Photo:
    "A photo that is decoded when it is used, and as finely as it is needed; a `PhotoError` names it where that fails"
    def __init__(self,
        image:str|Path|bytes|Image.Image|np.ndarray, # A file, its http(s) URL, its bytes, a PIL image, or an array (H,W,3) of uint8, RGB
    ):
        self.name, self.verb, self.data, self._img = f'this {type(image).__name__}', 'is', None, None
        if isinstance(image, (bytes, bytearray, memoryview)): self.name, self.verb = 'these bytes', 'are'
        if isinstance(image, (str, Path)): self.name = repr(shown_url(str(image)) if '://' in str(image) else str(image))
        if isinstance(image, Image.Image): self._img = image
        elif isinstance(image, np.ndarray): self._img = self._of_array(image)
        elif isinstance(image, (bytes, bytearray, memoryview)): self.data = bytearray(image)
        elif isinstance(image, str) and '://' in image: self.data = self._fetched(image)
        elif isinstance(image, (str, Path)): self.data = self._read(image)
        else:
            raise PhotoError(f"{self.name} is not a photo; pass a path, a URL (http or https), the bytes of a file, a PIL image, or an "
                             "array (height, width, 3) of uint8; `predict` also takes a list of these, or a folder")

    @classmethod
    def create(cls,
        image:str|Path|bytes|Image.Image|np.ndarray, # As above
        **kwargs
    ): return cls(image)

    @contextmanager
    def _named(self):
        try: yield
        except DataError: raise                                       # also of shards: what is wrong there is no photo's fault
        except FileNotFoundError: raise PhotoError(f"{self.name} does not exist") from None
        except Image.DecompressionBombError as e:
            raise PhotoError(f"{self.name} {self.verb} too large to be a photo: {e} Set PIL.Image.MAX_IMAGE_PIXELS higher if you trust it, "
                             "in the shell --max-pixels.") from None
        except Exception as e: raise PhotoError(f"{self.name} cannot be read as a photo: {_reason(e, self.data)}") from None

    def _read(self, path):
        if source := getattr(path, 'source', None):
            self.name = repr(source.shown)
            with self._named(): return source.read()
        with self._named():
            mode = os.stat(path).st_mode
            if not S_ISREG(mode): raise PhotoError(f"{self.name} is a {'folder' if S_ISDIR(mode) else 'pipe or a device'}, not a photo")
            with open(path, 'rb', buffering=0) as f: return _whole(f, path)

    def _fetched(self, url, limit=64<<20, seconds=60):
        if not url.lower().startswith(('http://', 'https://')):
            raise PhotoError(f"{shown_url(url)} starts with neither http:// nor https://")
        try: _download(url, out := BytesIO(), limit, seconds)
        except DataError as e: raise PhotoError(str(e)) from None
        if _is_page(out.getvalue()):
            raise PhotoError(f"{shown_url(url)} gave a web page, not a photo; open it in a browser, and copy the photo's own address")
        return bytearray(out.getbuffer())

    def _of_array(self, a):
        if a.dtype != np.uint8: raise PhotoError(f"{self.name} holds {a.dtype}; uint8 from 0 to 255 is needed: if x goes from 0 to 1, pass "
                                                 "(255*x).round().astype('uint8')")
        if not (a.size and (a.ndim == 2 or a.ndim == 3 and a.shape[2] in (3, 4))):
            raise PhotoError(f"{self.name} has the shape {a.shape}; (height, width, 3) is needed, or (height, width) if it is grey; "
                             "x.transpose(1, 2, 0) turns (3, height, width) into it")
        return Image.fromarray(a)

    def _open(self):
        "The PIL image, its header read and its pixels not yet"
        if self._img is None:
            self._img = _header(self.data)
            if self._img.format == 'TIFF': self._img.load()               # Pillow turns these by itself, as it loads them
        w,h = self._img.size
        if not 0 < max(w, h) <= 300*min(w, h): raise PhotoError(f"{self.name} {self.verb} {w:,}×{h:,} pixels: a strip, not a photo")
        return self._img

    @property
    def size(self) -> tuple: # Pixels
        "Width and height of the upright photo"
        with self._named():
            img = self._open()
            return img.size[::-1] if _turned(img) > 4 else img.size

    def _jpeg(self, f):
        "RGB of a JPEG at 1/f of its size; None where the decoder has a doubt that a kinder one may clear up"
        w,h = self._open().size
        try: rgb = decode_jpeg(self.data, 'RGB', min_height=-(-h//f), min_width=-(-w//f), min_factor=f)
        except ValueError as e:
            if str(e).startswith('Premature end of JPEG'):
                raise PhotoError(f"{self.name} {self.verb} cut short: a JPEG without its end; fetch it again") from None
            if 'remature' in str(e): raise PhotoError(f"{self.name} {self.verb} damaged: a part of its picture is missing") from None
            return None
        return _upright(torch.from_numpy(rgb).permute(2,0,1), _turned(self._open()))

    def _divisor(self, side):
        "By how much a JPEG is divided: as far as `side` allows, and by 2 where it has more pixels than Pillow takes"
        w,h = self._open().size
        if w*h > _limit() and (w*h > 2*_limit() or w*h > 64*len(self.data)):            # no photo has fewer bytes; a bomb has
            raise Image.DecompressionBombError(f"Its {w*h:,} pixels are more than {'twice ' if w*h > 2*_limit() else ''}the limit.")
        f = next((f for f,spare in ((8, 1.5), (4, 1.125), (2, 1.125)) if side and min(w, h) >= f*spare*side), 1)
        return max(f, 1 if w*h <= _limit() else 2)

    def pixels(self,
        side:int|None=None, # Pixels that the short side must keep; None: all
    ) -> tuple: # (RGB: (3,H,W) uint8 tensor or PIL image, at a scale of 1, 1/2, 1/4 or 1/8; that scale's divisor)
        "The upright photo, decoded no finer than needed; a JPEG of up to twice as many pixels as Pillow takes at 1/2 or less"
        with self._named():
            img = self._open()
            if self.data is not None and img.format in ('JPEG', 'MPO') and img.mode in ('RGB', 'L'):
                f = self._divisor(side)
                if (rgb := self._jpeg(f)) is not None: return rgb, f
            if self.data is not None:
                self._img = None                                           # used up: the next one reads the header again
                if (n := img.width*img.height) > _limit(): raise Image.DecompressionBombError(f"Its {n:,} pixels are more than the limit.")
            try: return _to_rgb(ImageOps.exif_transpose(img)), 1
            except OSError as e:
                if img.format in ('JPEG', 'MPO') and 'truncated' in str(e).lower():
                    raise PhotoError(f"{self.name} {self.verb} cut short: a JPEG without its end; fetch it again") from None
                raise

    def show(self, ctx=None, **kwargs): return show_image(open_photo(self), ctx=ctx, **kwargs)


def _limit():
    "Pixels above which Pillow refuses a picture"
    return 2*Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else float('inf')


def _whole(
    f, # A file, just opened, without a buffer
    path, # Its name
    large:int=64<<20, # Bytes from which on it must first look like a picture
) -> bytearray:
    "All of a file, read once; a large one only if Pillow knows its beginning"
    if (size := os.fstat(f.fileno()).st_size) > large:
        with Image.open(path): pass
    if not size: return bytearray(f.read())                           # some file systems do not know sizes
    data, done = bytearray(size), 0
    while done < size and (n := f.readinto(memoryview(data)[done:])): done += n
    return data if done == size else data[:done]


def _header(data):
    "The PIL image of a file's bytes; JPEGs without Pillow's limit, since they can be decoded at 1/8"
    if data[:3] == b'\xff\xd8\xff':
        with suppress(Exception): return jpeg_factory(BytesIO(data))
    if _is_heic(data): _heic_opener()
    return Image.open(BytesIO(data))


def _is_heic(data): return data[4:8] == b'ftyp' and data[8:12] in b'heic heix heim heis hevc hevx mif1 msf1'.split()


@lru_cache
def _heic_opener():
    "Let Pillow read HEIC, where it can learn that"
    with suppress(ImportError):
        from pillow_heif import register_heif_opener
        register_heif_opener()


def _reason(e, data):
    if isinstance(e, Image.UnidentifiedImageError):
        if data is None or not _is_heic(data): return 'not an image, or damaged'
        if find_spec('pillow_heif'): return 'it is a HEIC file, and damaged'
        return 'it is a HEIC file, as iPhones write them; to read these: pip install "resnet_fastai[heic]"'
    return getattr(e, 'strerror', None) or str(e) or type(e).__name__


def _turned(img):
    "EXIF's orientation, 1 to 8; from 5 on the sides change places. What is none of these counts as 1, as for Pillow"
    if img.format == 'JPEG' and not {'exif', 'xmp'} & img.info.keys(): return 1       # the usual case, without asking Pillow
    found = img.getexif().get(0x0112, 1)
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


_flips = {2: (2,), 3: (1,2), 4: (1,), 6: (2,), 7: (1,2), 8: (1,)}    # by orientation; from 5 on rows and columns are exchanged first


def _upright(rgb, orientation):
    "Turn (3,H,W) pixels as EXIF asks"
    if orientation > 4: rgb = rgb.transpose(1, 2)
    return rgb.flip(_flips[orientation]) if orientation in _flips else rgb


def open_photo(
    image:str|Path|bytes|Image.Image|np.ndarray|Photo, # What `Photo` takes
) -> Image.Image: # Upright, RGB, fully decoded
    "Decode a photo; a `PhotoError` that names it where that fails"
    rgb,_ = (image if isinstance(image, Photo) else Photo(image)).pixels()
    return rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb.permute(1,2,0).contiguous().numpy())
