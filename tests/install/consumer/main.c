#include <blasst/blasst.h>
#include <stdio.h>

int main(void) {
  blasst_attention_params params;
  blasst_attention_params_init(&params);
  if (blasst_prefill(&params) != BLASST_INVALID_ARGUMENT) return 1; /* heads is 0 */
  printf("blasst %s: %s\n", blasst_version(), blasst_last_error());
  return 0;
}
