"""Add experts, initialize and freeze them; remove and merge them."""
