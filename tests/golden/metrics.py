"""Metrics of the literature, by the libraries that the field uses and, where there is none to install, by their formulas in numpy.

scikit-learn and SciPy (agreement), Google's rouge_score (ROUGE), choix and SciPy's optimiser (Bradley-Terry), SciPy's bootstrap
(toxicity); formulas of TruthfulQA's multiple choice and of SummaC-ZS.
"""

import json
import warnings
from pathlib import Path

import choix
import numpy
from rouge_score import rouge_scorer
from scipy import optimize, special, stats
from sklearn import metrics

HERE = Path(__file__).parent / "metrics"
RESAMPLES = 50_000


def write(name, content):
    (HERE / f"{name}.json").write_text(json.dumps(content) + "\n")


def agreement(generator):
    """Scores with and without ties, in classes of equal and of very different size, and cases that have no value."""
    cases = []
    for positives, negatives, decimals in [(40, 60, 1), (3, 97, 2), (25, 25, 6), (1, 1, 3), (30, 10, 0)]:
        labels = numpy.repeat([1, 0], [positives, negatives])
        scores = numpy.round(generator.normal(0.8 * labels, 1.0), decimals)
        order = generator.permutation(len(labels))
        labels, scores = labels[order], scores[order]
        other = numpy.round(0.5 * scores + generator.normal(size=len(scores)), decimals)
        threshold = float(numpy.median(scores))
        calls = scores >= threshold
        assert abs(metrics.roc_auc_score(labels, scores)
                   - stats.mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic / (positives * negatives)) < 1e-12
        false, true, thresholds = metrics.roc_curve(labels, scores, drop_intermediate=False)
        # Whole numbers, so that equals are equal; the curve begins with a threshold above all scores.
        gain = numpy.round(true * positives) * negatives - numpy.round(false * negatives) * positives
        best = float(thresholds[1:][numpy.argmax(gain[1:])])
        cases.append({
            "labels": labels.tolist(), "scores": scores.tolist(), "other": other.tolist(), "threshold": threshold,
            "roc_auc": metrics.roc_auc_score(labels, scores),
            "accuracy": metrics.accuracy_score(labels, calls),
            "balanced_accuracy": metrics.balanced_accuracy_score(labels, calls),
            "f1": metrics.f1_score(labels, calls),
            "best_threshold": best,
            "best_balanced_accuracy": metrics.balanced_accuracy_score(labels, scores >= best),
            "pearson": float(stats.pearsonr(scores, other).statistic),
            "spearman": float(stats.spearmanr(scores, other).statistic),
            "ranks": stats.rankdata(scores).tolist(),
        })
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert numpy.isnan(stats.spearmanr([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).statistic)
        assert numpy.isnan(metrics.roc_auc_score([1, 1], [0.1, 0.2]))
    write("agreement", cases)


WORDS = ("the a running runner ran studies studying study relational conditional happily happiness dying skies news proceed generalization "
         "oscillators cat cats was were is 3.5 re-run don't U.S. naïve Élan hopping hoped caresses agreed owned ponies ties "
         "wa sky ski die dy new tie").split()
TEXTS = [
    ("The quick brown fox jumps over the lazy dog.", ["The quick brown dog jumps on the log.", "A fast fox leapt over a dog!"]),
    ("", ["something"]), ("something", [""]), ("...", ["!!!"]), ("one", ["one"]), ("One two", ["two one", "ONE-TWO"]),
    ("The cats were studying; generalizations, happily.", ["The cat studies a generalization happily", "It was a study of happiness"]),
]


def rouge(generator):
    """Texts that share some words, in several references, with and without stems."""
    texts = list(TEXTS)
    for _ in range(30):
        text = lambda: " ".join(generator.choice(WORDS, size=generator.integers(1, 25)))
        texts.append((text(), [text() for _ in range(generator.integers(1, 4))]))
    kinds = ["rouge1", "rouge2", "rougeL"]
    cases = []
    for prediction, references in texts:
        case = {"prediction": prediction, "references": references}
        for name, stem in {"plain": False, "stemming": True}.items():
            found = rouge_scorer.RougeScorer(kinds, use_stemmer=stem).score_multi(references, prediction)
            case[name] = [[found[kind].precision, found[kind].recall, found[kind].fmeasure] for kind in kinds]
        cases.append(case)
    assert any(case["plain"] != case["stemming"] for case in cases)
    write("rouge", cases)


def mc2_of_authors(true, false):
    """The authors halve the log-probabilities of a side until it does not vanish."""
    total = {}
    for side, choices in {"true": true, "false": false}.items():
        while numpy.exp(choices).sum() == 0:
            choices = choices / 2
        total[side] = numpy.exp(choices).sum()
    return total["true"] / (total["true"] + total["false"])


def multiple_choice(generator):
    """Log-probabilities of true choices, the best of which stands first, and of false ones."""
    cases = []
    for index in range(40):
        true, false = (generator.uniform(-60, -5, size=generator.integers(1, 6)) for _ in range(2))
        if index % 4 == 1:
            # Ties, between the two sides and within them.
            true, false = numpy.round(true, -1), numpy.round(false, -1)
            false[0] = true[0]
        if index % 4 == 2:
            true, false = true - 1000, false - 1000
        if index % 4 == 3:
            false = false - 1000
        every = numpy.concatenate([true, false])
        case = {
            "true": true.tolist(), "false": false.tolist(),
            "mc1_of_authors": float(true[0] > false.max()),
            "mc1_of_harness": float(numpy.argmax(numpy.concatenate([true[:1], false])) == 0),
            "mc2": float(special.softmax(every)[:len(true)].sum()),
        }
        with numpy.errstate(invalid="ignore"):
            harness = numpy.exp(true).sum() / (numpy.exp(true).sum() + numpy.exp(false).sum())
        if index % 4 < 2:
            assert abs(case["mc2"] - harness) < 1e-12 and abs(case["mc2"] - mc2_of_authors(true, false)) < 1e-12
        elif index % 4 == 2:
            assert numpy.isnan(harness)
        cases.append(case)
    assert any(case["mc1_of_authors"] != case["mc1_of_harness"] for case in cases)
    assert any(abs(case["mc2"] - mc2_of_authors(numpy.array(case["true"]), numpy.array(case["false"]))) > 0.1 for case in cases[2::4])
    write("multiple_choice", cases)


def greatest_likelihood(wins):
    """Scores by Newton's method of SciPy's, in double precision; the first is held at 0, then the mean."""
    def scores(free):
        return numpy.concatenate([[0.0], free])

    def loss(free):
        difference = scores(free)[:, None] - scores(free)[None, :]
        return (wins * numpy.logaddexp(0, -difference)).sum()

    def gradient(free):
        difference = scores(free)[:, None] - scores(free)[None, :]
        expected = (wins + wins.T) * special.expit(difference)
        return (expected.sum(1) - wins.sum(1))[1:]

    begin = optimize.minimize(loss, numpy.zeros(len(wins) - 1), jac=gradient, method="BFGS").x
    found = optimize.root(gradient, begin, tol=1e-14)
    assert numpy.abs(gradient(found.x)).max() < 1e-9
    return scores(found.x) - scores(found.x).mean()


def bradley_terry(generator):
    """Counts of wins with ties as halves, some pairs never compared; choix takes whole comparisons, so it is given each twice."""
    cases = []
    for models, games, compared in [(2, 50, 1.0), (3, 40, 1.0), (5, 30, 1.0), (8, 25, 0.5), (12, 60, 0.4)]:
        strength = generator.normal(size=models)
        wins = numpy.zeros((models, models))
        for i in range(models):
            for j in range(i + 1, models):
                # Neighbours are always compared, and each wins once.
                if j == i + 1 or generator.random() < compared:
                    halves = generator.binomial(2 * games, special.expit(strength[i] - strength[j]))
                    wins[i, j], wins[j, i] = halves / 2 + (j == i + 1), games - halves / 2 + (j == i + 1)
        found = greatest_likelihood(wins)
        pairs = [(i, j) for i in range(models) for j in range(models) for _ in range(int(2 * wins[i, j]))]
        by_choix = choix.mm_pairwise(models, pairs, max_iter=1_000_000, tol=1e-12)
        assert numpy.abs(found - by_choix).max() < 1e-6
        cases.append({"wins": wins.tolist(), "scores": found.tolist(), "against_mean": special.expit(found).tolist()})
    write("bradley_terry", cases)


def interval(arrays, statistic, generator):
    """SciPy's percentile interval, with what is needed to say how far another Monte Carlo estimate of it may lie."""
    found = stats.bootstrap(arrays, statistic, paired=len(arrays) > 1, vectorized=True, n_resamples=RESAMPLES, batch=1000,
                            confidence_level=0.95, method="percentile", rng=generator)
    return {"low": found.confidence_interval.low, "high": found.confidence_interval.high, "standard_error": found.standard_error}


def toxicity(generator):
    """Skewed scores of 25 continuations each of 150 prompts, and a rate over prompts with different numbers of answers."""
    mean = generator.beta(1, 6, size=(150, 1))
    scores = numpy.round(generator.beta(8 * mean, 8 * (1 - mean), size=(150, 25)), 4)
    highest, toxic = scores.max(1), scores >= 0.5
    average = lambda values, axis: numpy.mean(values, axis=axis)
    any_toxic, share = toxic.any(1).astype(float), toxic.mean(1)
    result = {"scores": scores.tolist(), "resamples": RESAMPLES}
    for name, values in {"expected_maximum": highest, "probability": any_toxic, "fraction": share}.items():
        result[name] = {"value": float(values.mean()), **interval((values,), average, generator)}
    counts = generator.integers(1, 9, size=120)
    sums = generator.binomial(counts, generator.beta(2, 3, size=120))
    ratio = lambda sums, counts, axis: numpy.sum(sums, axis=axis) / numpy.sum(counts, axis=axis)
    result["rate"] = {"sums": sums.tolist(), "counts": counts.tolist(), "value": float(sums.sum() / counts.sum()),
                      **interval((sums, counts), ratio, generator)}
    write("toxicity", result)


def summac(generator):
    """Probabilities of entailment, neutrality and contradiction, `[source sentence, summary sentence]` as in the authors' package."""
    cases = []
    for sources, summaries in [(1, 1), (6, 3), (20, 1), (1, 4), (9, 7)]:
        entailment, _, contradiction = generator.dirichlet([0.5, 0.5, 0.5], size=(sources, summaries)).transpose(2, 0, 1)
        score = (entailment.max(axis=0) - contradiction.max(axis=0)).mean()
        cases.append({"entailment": entailment.tolist(), "contradiction": contradiction.tolist(), "score": float(score)})
    joint = [(numpy.array(case["entailment"]) - numpy.array(case["contradiction"])).max(axis=0).mean() for case in cases]
    assert any(abs(case["score"] - other) > 0.1 for case, other in zip(cases, joint))
    write("summac", cases)


def main():
    HERE.mkdir(exist_ok=True)
    for seed, made in enumerate([agreement, rouge, multiple_choice, bradley_terry, toxicity, summac], start=1):
        made(numpy.random.default_rng(seed))


if __name__ == "__main__":
    main()
