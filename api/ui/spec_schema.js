// What the JSON schema in /openapi.json says of the fields of a spec, in the terms of the form.

/** Groups in which fields are shown; a field that no group names is shown in the last one, so none is ever missing. */
export const GROUPS = [
  ["Search", ["search"]],
  ["What is trained", ["method", "lora", "bias", "ia3", "adapter", "head", "base"]],
  ["Regularization", ["l1", "l2", "l2_sp", "dropout", "label_smoothing", "mixup", "augmentation", "ema"]],
  ["Robustness", ["adversarial"]],
  ["Training", ["epochs", "learning_rate", "schedule", "optimizer", "momentum", "weight_decay", "batch_size", "min_steps", "class_weights", "early_stopping"]],
  ["Evaluation", ["validation_split", "folds", "calibrate", "coverage", "twin", "gate"]],
  ["Everything else", []],
];

/** [group, names of its fields] of a schema. */
export function grouped(schema) {
  const named = new Set(GROUPS.flatMap(([, names]) => names));
  const rest = Object.keys(schema.properties).filter((name) => !named.has(name));
  return GROUPS.map(([title, names]) => [title, names.length ? names.filter((name) => name in schema.properties) : rest]);
}

/**
 * A field's schema as {kind, …}: "number", "choice", "boolean", "several", "object", "variants", "text" or "json" (for
 * what has no control of its own); `nullable` if null switches it off.
 */
export function fieldOf(schema, schemas) {
  const options = (schema.anyOf ?? [schema]).filter((one) => one.type !== "null");
  const nullable = schema.anyOf?.some((one) => one.type === "null") ?? false;
  const described = { description: schema.description, default: schema.default, nullable };
  if (options.length !== 1) return { ...described, kind: "json" };
  const one = resolved(options[0], schemas);
  return { ...described, ...control(one, schemas) };
}

function control(one, schemas) {
  if (one.oneOf) {
    const variants = one.oneOf.map((each) => resolved(each, schemas));
    const tag = Object.keys(variants[0].properties).find((name) => variants.every((each) => each.properties[name]?.const));
    return { kind: "variants", tag, variants: Object.fromEntries(variants.map((each) => [each.properties[tag].const, each])) };
  }
  if (one.const !== undefined) return { kind: "choice", choices: [one.const] };
  if (one.enum) return { kind: "choice", choices: one.enum };
  if (one.type === "boolean") return { kind: "boolean" };
  if (one.type === "array" && one.items.enum) return { kind: "several", choices: one.items.enum };
  if (one.type === "object" && one.properties) return { kind: "object", schema: one };
  if (one.type === "number" || one.type === "integer") {
    const least = one.minimum ?? one.exclusiveMinimum, most = one.maximum ?? one.exclusiveMaximum;
    return { kind: "number", whole: one.type === "integer", least, most };
  }
  return { kind: one.type === "string" ? "text" : "json" };
}

const resolved = (schema, schemas) => (schema.$ref ? schemas[schema.$ref.split("/").at(-1)] : schema);

/** `given` with a value at a path; undefined takes it out, and objects that are empty then with it. */
export function withValue(given, [name, ...rest], value) {
  const inner = rest.length ? withValue(given?.[name] ?? {}, rest, value) : value;
  const { [name]: _, ...others } = given ?? {};
  return inner === undefined ? others : { ...others, [name]: inner };
}

export const valueAt = (given, path) => path.reduce((inner, name) => inner?.[name], given);

const NAMES = { l1: "L1 (lasso)", l2: "L2 (ridge)", l2_sp: "L2-SP", ema: "EMA of the weights", lora: "LoRA", ia3: "IA³", mixup: "MixUp", twin: "Unregularized twin" };

export function titleOf(name) {
  return NAMES[name] ?? name.replaceAll("_", " ").replace(/^./, (first) => first.toUpperCase());
}
