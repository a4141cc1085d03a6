#include "isa_headers.h"

#include "gradients_loops.h"
#include "multi_loss_loops.h"
#include "roi_align_loops.h"
#include "roi_perceptual_loops.h"
