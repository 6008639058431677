"""Keys of the attributes that this package stores on studies and trials."""

from __future__ import annotations

# user attributes of a study
SPACE_ATTR = "rankadaptor:space"  # the rank space, as RankSpace.to_dict returns it
PRIOR_ATTR = "rankadaptor:prior"  # identity of the prior that the study began with
RECIPE_ATTR = "rankadaptor:recipe"  # settings of its trials
SENSITIVITY_ATTR = "rankadaptor:sensitivity"  # sensitivity of the loss to each layer's adapter, by rank parameter
CONVERGED_ATTR = "rankadaptor:converged"  # statement of StopWhenConverged

# user attributes of a trial
VERIFY_ATTR = "rankadaptor:verify"  # seed of a verification trial
ITEMS_ATTR = "rankadaptor:items"  # True where the steps of the reports are items of an evaluation

# system attributes of a trial
PROPOSAL_ATTR = "rankadaptor:proposal"  # announced ranks, in the grid's order
