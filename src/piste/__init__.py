"""piste: every PyTorch optimizer worth trying, one rule on every engine, raced honestly on your own problem."""

from piste import schedules as schedules
from piste.batchnorm import recalibrate as recalibrate
from piste.groups import describe_groups as describe_groups
from piste.groups import param_groups as param_groups
from piste.optimizer import Optimizer as Optimizer
from piste.optimizers import ADOPT as ADOPT
from piste.optimizers import MADGRAD as MADGRAD
from piste.optimizers import PNM as PNM
from piste.optimizers import SGD as SGD
from piste.optimizers import SM3 as SM3
from piste.optimizers import AdaBelief as AdaBelief
from piste.optimizers import Adam as Adam
from piste.optimizers import AdamW as AdamW
from piste.optimizers import Adan as Adan
from piste.optimizers import AdaPNM as AdaPNM
from piste.optimizers import AdEMAMix as AdEMAMix
from piste.optimizers import Lamb as Lamb
from piste.optimizers import LaProp as LaProp
from piste.optimizers import Lion as Lion
from piste.optimizers import LookaheadAdam as LookaheadAdam
from piste.optimizers import MirrorMADGRAD as MirrorMADGRAD
from piste.optimizers import NAdamW as NAdamW
from piste.optimizers import NovoGrad as NovoGrad
from piste.optimizers import RAdam as RAdam
from piste.optimizers import Ralamb as Ralamb
from piste.optimizers import Ranger as Ranger
from piste.optimizers import RangerAdaBelief as RangerAdaBelief
from piste.optimizers import RangerLars as RangerLars
from piste.optimizers import RMSprop as RMSprop
from piste.optimizers import StableAdamW as StableAdamW
from piste.presets import Preset as Preset
from piste.presets import presets as presets
from piste.registry import create as create
from piste.registry import list_optimizers as list_optimizers
from piste.registry import optimizer_info as optimizer_info
from piste.registry import state_bytes as state_bytes
from piste.wrappers import Graft as Graft
from piste.wrappers import Lookahead as Lookahead
from piste.wrappers import ModelEMA as ModelEMA

__version__ = "0.1.0"
