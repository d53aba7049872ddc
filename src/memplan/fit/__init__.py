"""
The smallest change that makes a job fit, and how far one field can go.

* `lattice.py`   edits, independent dimensions of them, and the order that says which combination is smaller
* `changes.py`   the lattice of a job: tiers 0, 2 and 3; `slower.py` tier 1; `capacity.py` tier 4
* `costs.py`     predicted slowdowns and their sources
* `search.py`    the smallest combination that fits, exactly
* `frontier.py`  the longest sequence and the largest micro batch that fit
"""

from memplan.fit.changes import candidate_edits
from memplan.fit.frontier import Frontier, maximize
from memplan.fit.search import Evaluate, Search, search_changes, smallest_changes

__all__ = [
    "Evaluate",
    "Frontier",
    "Search",
    "candidate_edits",
    "maximize",
    "search_changes",
    "smallest_changes",
]
