"""Epochs for trackers: TensorBoard, Weights & Biases, MLflow, or a function of your own."""
from fastai.callback.core import Callback
from fastai.torch_core import rank_distrib


class _Events:
    "TensorBoard's files, written as they come"
    def __init__(self, folder): self.folder,self.writer = str(folder),None
    def __getstate__(self): return dict(folder=self.folder, writer=None)
    def __call__(self, row, step):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = self.writer or SummaryWriter(self.folder)
        for name,value in row.items(): self.writer.add_scalar(name, value, step)
        self.writer.flush()


class LogEpochs(Callback):
    "After each epoch, hand the row of the history to a function: `mlflow.log_metrics`, `wandb.log`, or that of `tensorboard`"
    order,remove_on_fetch = 99,True                         # when `History` has written the row
    def __init__(self,
        log, # log({'train_loss': 1.2, …}, step=epoch)
    ): self.log,self.trained,self.failed = log,False,False

    @classmethod
    def tensorboard(cls,
        folder, # Of the event files
    ):
        "For TensorBoard: each column of the history is a curve over the epochs"
        return cls(_Events(folder))

    def before_epoch(self): self.trained = False            # validate() and get_preds() are epochs too
    def before_train(self): self.trained = True
    def after_epoch(self):
        if not self.trained or rank_distrib() or hasattr(self.learn, 'lr_finder'): return
        row = dict(self.learn.history.rows[-1])
        epoch = row.pop('epoch')
        try: self.log({name: float(v) for name,v in row.items() if isinstance(v, (int, float))}, step=epoch)
        except Exception as e:                              # a tracker that cannot be reached is no reason to end a run
            if not self.failed: print(f'epoch {epoch} was not logged: {type(e).__name__}: {str(e)[:200]}')
            self.failed = True
