"""The experiment: denoisers x objectives x seeds on several stores, in cells that resume and that processes share."""
