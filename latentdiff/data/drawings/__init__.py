"""The drawings data set: six emoji sets of different designs, with names in any CLDR language."""
