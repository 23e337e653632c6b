// Arrays that say how row ids give keys, checked.
#pragma once

#include "address_map.h"
#include "arrays.h"

namespace tierstore {

// num_residues, int64 [O]; inverses, int64 [O, F], of a checked map. The result looks at the arrays.
KeyResidues key_residues(const Input<int64_t>& num_residues, const Input<int64_t>& inverses, const AddressMap& map);

}  // namespace tierstore
