"""LoRA in ten steps: from a pretrained model and some quotations to an adapter that writes quotations.

The steps, names and settings are those of the field's well-known tutorial; only the import says ``lorakeet`` where it
said ``peft``. Training uses the plain ``transformers.Trainer``. docs/tour.md explains every step.

    python examples/ten_steps.py              # the whole job, on the embedded model and quotations
    python examples/ten_steps.py --steps 5    # only to see it run
"""

# ---- 1. Load the libraries -------------------------------------------------------------------------------------------
import argparse

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from lorakeet import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from lorakeet.base.source import find_source, local_folder
from lorakeet.config import DEFAULT_MODEL, DataSettings
from lorakeet.data import read_rows

flags = argparse.ArgumentParser(description="LoRA in ten steps")
flags.add_argument("--steps", type=int, default=200, help="optimizer steps")
flags.add_argument("--out", default="ten-steps", help="folder of the adapter")
flags.add_argument("--push", metavar="REPO", help="also upload the adapter to this hub repository, user/name")
flags.add_argument("--base", default=DEFAULT_MODEL, help="folder, GGUF file or hub id of the base model")
args = flags.parse_args()
set_seed(42)


# ---- 2. Load the base model ------------------------------------------------------------------------------------------
def load(name):
    """Load the model and its tokenizer; local_folder finds the files: downloaded, or unpacked from the embedded package."""
    folder = local_folder(find_source(name))
    # In full precision. For a base in 8 bits add quantization_config=lorakeet.Int8Config().
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto")
    return model, AutoTokenizer.from_pretrained(folder)


model, tokenizer = load(args.base)

# ---- 3. Freeze it and make training stable ---------------------------------------------------------------------------
model = prepare_model_for_kbit_training(model)

# ---- 4. Put a pair of small matrices beside the query and value projections, and count the parameters ----------------
config = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
    base_model_name_or_path=args.base,  # the public name, where the model was read from a folder of the cache
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

# ---- 5. Load the quotations ------------------------------------------------------------------------------------------
quotations = read_rows(DataSettings(path="fortunes")).data  # a datasets.Dataset, as load_dataset() would give
print(quotations)

# ---- 6. Tokenize -----------------------------------------------------------------------------------------------------
# A trap: the collator of step 7 recognizes padding by its token id and masks it. If the end token also pads, every end is
# masked, and the model never learns to stop. So use another token for padding. (lorakeet.Trainer and `lorakeet train`
# mask padding by position, and are not affected.)
if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
    tokenizer.pad_token = tokenizer.unk_token
assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id), "give the tokenizer a padding token of its own"


def tokenize(rows):
    return tokenizer([text + tokenizer.eos_token for text in rows["text"]], truncation=True, max_length=256)


samples = quotations.map(tokenize, batched=True, remove_columns=quotations.column_names)

# ---- 7. Train --------------------------------------------------------------------------------------------------------
trainer = Trainer(
    model=model,
    train_dataset=samples,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    args=TrainingArguments(
        output_dir=args.out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        warmup_steps=min(100, args.steps // 2),
        max_steps=args.steps,
        learning_rate=2e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
)
trainer.train()

# ---- 8. Save the adapter, and share it -------------------------------------------------------------------------------
model.save_pretrained(args.out)
tokenizer.save_pretrained(args.out)
if args.push:
    print(model.push_to_hub(args.push))

# ---- 9. Load it back -------------------------------------------------------------------------------------------------
config = PeftConfig.from_pretrained(args.out)
base, tokenizer = load(config.base_model_name_or_path)
model = PeftModel.from_pretrained(base, args.out)

# ---- 10. Generate ----------------------------------------------------------------------------------------------------
prompt = tokenizer("Two things are infinite:", return_tensors="pt").to(model.device)
with model.disable_adapter():
    before = model.generate(**prompt, max_new_tokens=40, do_sample=False)
after = model.generate(**prompt, max_new_tokens=40, do_sample=False)
print("base:   ", tokenizer.decode(before[0], skip_special_tokens=True))
print("adapter:", tokenizer.decode(after[0], skip_special_tokens=True))
