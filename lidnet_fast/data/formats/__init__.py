"""Files of CT: found below folders, read as series in Hounsfield units, written as derived images."""
