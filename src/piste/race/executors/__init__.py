"""Who makes the runs: worker processes of this machine, later of others, behind one face."""

from piste.race.executors.local import Death as Death
from piste.race.executors.local import Event as Event
from piste.race.executors.local import Executor as Executor
from piste.race.executors.local import ExecutorError as ExecutorError
