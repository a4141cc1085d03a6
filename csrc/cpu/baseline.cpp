#define LID_ISA baseline
#include "isa_headers.h"

#include "gradients_loops.h"
#include "multi_loss_loops.h"
#include "roi_loops.h"
