#!/usr/bin/env bash
# From nothing to a small vision-language model that answers questions about pictures, on a CPU with 2 cores:
#   scripts/quickstart.sh
# Each step is an ordinary command, printed before it runs. Stop it whenever you like: run again, it goes on from the
# last checkpoint. To start over, delete runs/quickstart.
set -euo pipefail
trap 'exit 130' INT

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
[[ $# -eq 0 ]] || { echo "quickstart: takes no arguments" >&2 && exit 2; }
bash scripts/setup.sh
export PATH=$root/.venv/bin:$PATH JAX_PLATFORMS=cpu

run=runs/quickstart
data=$run/data
step() {
  printf '\n$'
  printf ' %q' "$@"
  printf '\n'
  "$@"
}
start=$SECONDS

step python scripts/make_shapes.py --out $data

if [[ ! -e $run/tokenizer.model ]]; then
  step python scripts/train_tokenizer.py --json $data/pretrain.json $data/finetune.json --vocab-size 600 --force \
    --output $run/shapes.model --extra-text "A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:"
  step python -m neva_jax.convert add-tokens --input $run/shapes.model --output $run/tokenizer.model \
    --tokens "<extra_id_0>" "<extra_id_1>" "<extra_id_2>" "<extra_id_3>" \
    "<extra_id_4>" "<extra_id_5>" "<extra_id_6>" "<extra_id_7>"
fi

step python -m neva_jax.train --config configs/quickstart_pretrain.yaml
step python -m neva_jax.train --config configs/quickstart_finetune.yaml

# score QUESTIONS IMAGES ANSWERS: answers the questions with the trained model.
score() {
  step python -m neva_jax.evaluate run --checkpoint $run/finetune --task exact \
    --questions "$data/$1.jsonl" --images "$2" --answers "$run/answers/$3.jsonl" | tee "$run/answers/$3.score"
}
mkdir -p $run/answers
score heldout $data/images heldout
score heldout $data/grey grey
score unseen $data/images unseen

# The first held-out question about a colour, asked by hand.
question=$(grep -m 1 '"color"' $data/heldout.jsonl)
field() { python -c 'import json, sys; print(json.loads(sys.argv[1])[sys.argv[2]])' "$question" "$1"; }
step python -m neva_jax.generate --checkpoint $run/finetune --image "$data/images/$(field image)" --prompt "$(field text)"
echo "(right: $(field answer))"

result() { tail -n 1 "$run/answers/$1.score"; }
cat <<END

done in $((SECONDS - start)) s. The results lie in $run:
  pretrain/, finetune/   config.yaml, metrics.jsonl, log.txt, plots/loss.png, checkpoints/
  answers/               the answers to every question, with their scores
grey pictures instead of the real ones: $(result grey | sed 's/exact match: //')
combinations never seen in training:    $(result unseen | sed 's/exact match: //')
held-out $(result heldout)
END
