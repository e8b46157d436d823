import warnings

__version__ = "0.1.0"

warnings.filterwarnings('ignore', message='.*torch.jit.script', category=FutureWarning)   # fastai's import, no concern of the user's
