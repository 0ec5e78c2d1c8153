"""All that piste has to say about a setup: one small function for each thing, in a file for each topic."""

from piste.advise.finding import Rule
from piste.advise.rules import averages, choice, precision, schedule, settings, sharpness, weights

__all__ = ["RULES", "TOPICS"]

#: the files in the order of the documentation's page, each named by its first line
TOPICS = (choice, weights, settings, schedule, precision, sharpness, averages)

RULES: tuple[Rule, ...] = tuple(rule for topic in TOPICS for rule in topic.RULES)
