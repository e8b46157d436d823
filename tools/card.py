"nbs/images/card.png: what a link to the site looks like where somebody shares it."
from configparser import ConfigParser
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

root = Path(__file__).resolve().parent.parent


def box(ax, y, text, color):
    style = dict(boxstyle='round,pad=.55', fc=color, ec='none')
    ax.text(.82, y, text, ha='center', va='center', fontsize=19, color='#1b2733', bbox=style, zorder=3)


def draw_card(title, line):
    "A residual block beside the title, 1200×630 pixels"
    fig = plt.figure(figsize=(12, 6.3), dpi=100, facecolor='#14202e')
    ax = fig.add_axes([0, 0, 1, 1], xlim=(0, 1), ylim=(0, 1))
    ax.axis('off')
    ax.text(.06, .66, title, fontsize=52, color='white', weight='bold', va='center')
    ax.text(.06, .42, line, fontsize=24, color='#c9d6e4', va='center', linespacing=1.5)
    ax.text(.06, .17, '$y = F(x) + x$', fontsize=34, color='#ffb454', va='center')
    ys, texts = [.82, .66, .50, .30, .14], ['3×3 conv, BN', 'ReLU', '3×3 conv, BN', '+', 'ReLU']
    for y, text in zip(ys, texts): box(ax, y, text, '#ffd88a' if text == '+' else '#9fd0ff')
    ax.plot([.82, .82], [.97, .04], color='#c9d6e4', lw=3, zorder=1)
    ax.plot([.82, .95, .95, .835], [.92, .92, .30, .30], color='#ff8f6b', lw=5, zorder=2, solid_joinstyle='round')
    return fig


def main():
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    fig = draw_card(ini['DEFAULT']['title'], 'Deep Residual Learning (He et al., 2015)\nas notebooks that run, on fastai')
    fig.savefig(root/'nbs'/'images'/'card.png')


if __name__ == '__main__': main()
