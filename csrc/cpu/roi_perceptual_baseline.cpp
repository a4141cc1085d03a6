#include "isa_headers.h"

#define LID_ISA baseline
#include "roi_perceptual_loops.h"
