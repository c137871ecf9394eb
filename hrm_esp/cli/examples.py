"""The examples at the end of each command's help."""

EXAMPLES = {
    "": """\
examples:
  hrm-esp pretrain                        on the bundled stories, 10 minutes
  hrm-esp finetune                        on the bundled numbers in words
  hrm-esp generate --prompt "4827"        cuatro mil ochocientos veintisiete
  hrm-esp COMMAND --help                  the flags of a command
""",
    "pretrain": """\
examples:
  hrm-esp pretrain corpus.txt
  hrm-esp pretrain books/ --val held_out.txt --minutes 60
  hrm-esp pretrain corpus.txt --size tiny --epochs 3
  hrm-esp pretrain poems.txt --sep stanza
  hrm-esp pretrain new.txt --ckpt checkpoints --out_dir further
  hrm-esp pretrain corpus.txt --set optimizer=adamw --set lr=1e-3
""",
    "finetune": """\
examples:
  hrm-esp finetune data.tsv
  hrm-esp finetune data.tsv --ckpt checkpoints/pretrain_last.pt --minutes 15
  hrm-esp finetune data.tsv --from_scratch --size tiny
  hrm-esp finetune data.csv --prompt_col frase --target_col corregida
""",
    "generate": """\
examples:
  hrm-esp generate --prompt "En un lugar de la Mancha"
  hrm-esp generate --prompt "La casa" --temperature 0.6 --top_k 40 --seed 1
  hrm-esp generate                        asks for one line after another
  hrm-esp generate --ckpt checkpoints/pretrain_best.pt --prompt "" --max_new_tokens 200
  hrm-esp generate --prompt "Había una vez" --num_samples 5 --stop "."
  hrm-esp generate --prompts questions.csv -o answers.csv
""",
    "evaluate": """\
examples:
  hrm-esp evaluate book.txt
  hrm-esp evaluate held_out.csv --ckpt checkpoints/finetune_best.pt --json
  hrm-esp evaluate poem.txt --by word > surprisal.tsv
  hrm-esp evaluate poem.txt --html poem.html
""",
    "restore": """\
examples:
  hrm-esp restore letter.txt -o restored.txt
  echo "Manana volvere a Malaga" | hrm-esp restore
  hrm-esp restore letter.txt --diff --min_p 0.9
""",
    "pairs": """\
examples:
  hrm-esp pairs corpus.txt -o accents.tsv
  hrm-esp finetune accents.tsv
""",
    "info": """\
examples:
  hrm-esp info
  hrm-esp info checkpoints/pretrain_last.pt
  hrm-esp info checkpoints --card es > card.md
""",
    "plans": """\
examples:
  hrm-esp plans corpus.txt
  hrm-esp plans "Había una vez" "El mar está lejos" -o map.png
  hrm-esp plans corpus.txt --json > plans.jsonl
""",
    "plot": """\
examples:
  hrm-esp plot
  hrm-esp plot small base -o comparison.svg
""",
}
