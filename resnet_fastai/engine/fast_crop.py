"""Resize and crop at once, without resizing what the crop leaves out."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .photo import Photo


def short_size(
    w:int, h:int, # Size of a photo, pixels
    side:int, # The new length of its shorter side, pixels
) -> tuple: # (width, height), pixels
    "The size in the same proportions whose shorter side has a given length"      # §3.4
    return (side, max(1, int(side*h/w))) if w <= h else (max(1, int(side*w/h)), side)


def cutter(
    img:Image.Image, # RGB
    side:int, # Length that its short side is resized to, pixels
    most:int=1<<24, # Pixels of a resized photo; of a larger one only the parts are made that are asked for
): # A function: (left, upper, width, height) in the resized photo → (height,width,3) uint8
    "Cut parts out of a resized photo, which for a long strip would be very large"
    (w,h), (W,H) = img.size, short_size(*img.size, side)
    if W*H <= most:
        whole = np.asarray(img if (W,H) == (w,h) else img.resize((W,H), Image.Resampling.BILINEAR))
        return lambda x,y,across,down: whole[y:y+down, x:x+across]
    rim = [math.ceil(max(1, N/n)) + 2 for n,N in ((w,W), (h,H))]                    # resized pixels that a pixel of the photo reaches
    def part(x, y, across, down):
        x0, y0, x1, y1 = max(0, x - rim[0]), max(0, y - rim[1]), min(W, x + across + rim[0]), min(H, y + down + rim[1])
        out = img.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=(x0*w/W, y0*h/H, min(w, x1*w/W), min(h, y1*h/H)))
        return np.asarray(out)[y-y0:y-y0+down, x-x0:x-x0+across]
    return part


def _early(
    start:int, # First pixel of the crop, in the resized photo
    step:float, # Pixels of the photo for each of the resized one
    reach:int=64, near:float=.05, # How far to look, resized pixels; what counts as on the spot, photo pixels
) -> tuple|None: # (how many resized pixels earlier, that place in the photo)
    "A place before the crop where a pixel of the resized photo begins with a pixel of the photo"
    # PyTorch's resampling starts at whole pixels. At 375 → 300 pixel 37 begins at 46.25, between two, but pixel 36 at 45: start there and
    # drop one. Where no such place is near, Pillow's slower resampling, which starts anywhere, does it (in `crop_photo`).
    for k in range(math.ceil(max(1, 1/step)), reach):
        if k >= start: return start, 0
        if abs((at := (start-k)*step) - round(at)) <= near: return k, round(at)


def _resample(
    rgb:torch.Tensor, # (3,H,W) uint8
    sx:float, sy:float, # Pixels of it for each of the resized photo
    box:tuple, # The crop, in the resized photo
) -> torch.Tensor|None: # (3,h,w) uint8; None where no place to begin is near
    "Resize and crop at once"
    (h,w), (left,upper,right,lower) = rgb.shape[1:], box
    if not (x := _early(left, sx)) or not (y := _early(upper, sy)): return None
    ends = lambda end,step,n: min(n, math.ceil((end+1)*step + max(1, step)))
    part = rgb[None, :, y[1]:ends(lower, sy, h), x[1]:ends(right, sx, w)]
    part = part.contiguous(memory_format=torch.channels_last)                    # or PyTorch takes its slow way
    out = F.interpolate(part, scale_factor=(1/sy, 1/sx), mode='bilinear', antialias=True)[0]
    if any(n == m and step != 1 for n,m,step in zip(part.shape[2:], out.shape[1:], (sy, sx))): return None   # PyTorch copies then
    out = out[:, y[0]:y[0]+lower-upper, x[0]:x[0]+right-left]
    return out if out.shape[1:] == (lower-upper, right-left) else None           # the far edge may fall short by a pixel


def crop_photo(
    photo:Photo, # Any size
    side:int, # Length that its short side is resized to, pixels
    box:tuple, # (left, upper, right, lower) of the crop in the resized photo
) -> torch.Tensor: # (3,h,w) uint8, RGB
    "The crop of a resized photo, without resizing what the crop leaves out"
    (w,h), (W,H) = photo.size, short_size(*photo.size, side)
    rgb,f = photo.pixels(side)
    sx, sy = w/f/W, h/f/H
    if isinstance(rgb, torch.Tensor):
        if (out := _resample(rgb, sx, sy, box)) is not None: return out
        rgb = Image.fromarray(rgb.permute(1,2,0).contiguous().numpy())
    out = rgb.resize((box[2]-box[0], box[3]-box[1]), Image.Resampling.BILINEAR,
                     box=(box[0]*sx, box[1]*sy, min(box[2]*sx, rgb.width), min(box[3]*sy, rgb.height)))
    return torch.from_numpy(np.array(out)).permute(2,0,1)
