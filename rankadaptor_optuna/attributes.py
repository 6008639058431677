"""Keys of the attributes that this package stores on studies and trials."""

from __future__ import annotations

# user attributes of a study
SPACE_ATTR = "rankadaptor:space"
PRIOR_ATTR = "rankadaptor:prior"
RECIPE_ATTR = "rankadaptor:recipe"
SENSITIVITY_ATTR = "rankadaptor:sensitivity"
CONVERGED_ATTR = "rankadaptor:converged"

# user attributes of a trial
VERIFY_ATTR = "rankadaptor:verify"
ITEMS_ATTR = "rankadaptor:items"

# a system attribute of a trial
PROPOSAL_ATTR = "rankadaptor:proposal"
