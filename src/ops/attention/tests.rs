use candle_core::{DType, Tensor};
use proptest::prelude::*;

use super::*;
use crate::ops::testing::{
    Operand, assert_close, assert_same_bits_on_any_number_of_threads, compare, compare_with_finite_differences, random,
    run,
};

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    let scale = 1.0 / (head_dim as f64).sqrt();
    AttentionShape { heads, kv_heads, head_dim, scale, soft_cap: None, window: None, causal: true }
}

fn span(start: usize, len: usize) -> Span {
    Span { start, len }
}

/// Segments laid end to end; each names its parent and continues it.
fn plan(segments: &[(usize, Option<usize>)]) -> Arc<AttentionPlan> {
    let mut starts = Vec::new();
    let mut end = 0;
    for &(len, _) in segments {
        starts.push(end);
        end += len;
    }
    let queries = (0..segments.len())
        .map(|index| {
            let mut keys = Vec::new();
            let mut next = Some(index);
            while let Some(segment) = next {
                keys.push(span(starts[segment], segments[segment].0));
                next = segments[segment].1;
            }
            keys.reverse();
            Query { rows: span(starts[index], segments[index].0), keys }
        })
        .collect();
    Arc::new(AttentionPlan { queries })
}

fn operands(shape: &AttentionShape, tokens: usize) -> [Operand; 3] {
    let kv = Operand::new(&[tokens, shape.kv_heads * shape.head_dim]);
    [Operand::new(&[tokens, shape.heads * shape.head_dim]), kv.clone(), kv]
}

fn packed_operand(shape: &AttentionShape, tokens: usize) -> [Operand; 1] {
    [Operand::new(&[tokens, (shape.heads + 2 * shape.kv_heads) * shape.head_dim])]
}

fn tokens_of(plan: &AttentionPlan) -> usize {
    plan.queries.iter().map(|query| query.rows.len).sum()
}

fn compare_both_forms(shape: AttentionShape, plan: &Arc<AttentionPlan>) {
    let tokens = tokens_of(plan);
    compare(
        &operands(&shape, tokens),
        |t| attention(&t[0], &t[1], &t[2], &shape, plan),
        |t| reference(&t[0], &t[1], &t[2], &shape, plan),
    );
    compare(
        &packed_operand(&shape, tokens),
        |t| attention_packed(&t[0], &shape, plan),
        |t| {
            let columns = |range: Range<usize>| t[0].narrow(1, range.start, range.len());
            let [q, k, v] = shape.packed_columns().map(columns);
            reference(&q?, &k?, &v?, &shape, plan)
        },
    );
}

#[test]
fn values_and_gradients_are_those_of_the_reference() {
    let forest = plan(&[(5, None), (3, Some(0)), (9, Some(0)), (70, None), (1, Some(3)), (2, Some(4)), (65, Some(3))]);
    for (heads, kv_heads, head_dim) in [(1, 1, 8), (4, 2, 16), (6, 1, 24), (2, 2, 5), (3, 3, 64)] {
        compare_both_forms(shape(heads, kv_heads, head_dim), &forest);
    }
    compare_both_forms(shape(2, 1, 8), &plan(&[(1, None)]));
    compare_both_forms(shape(2, 1, 8), &plan(&[(200, None), (129, None)]));
}

#[test]
fn a_soft_cap_agrees_with_the_reference_and_matters() {
    let forest = plan(&[(90, None), (3, Some(0)), (20, Some(0)), (1, Some(2))]);
    for soft_cap in [Some(0.5), Some(2.0), Some(50.0)] {
        compare_both_forms(AttentionShape { soft_cap, ..shape(4, 2, 8) }, &forest);
        compare_both_forms(AttentionShape { soft_cap, window: Some(7), ..shape(2, 2, 8) }, &forest);
    }
    let capped = AttentionShape { soft_cap: Some(0.5), ..shape(2, 1, 4) };
    let plan = plan(&[(5, None)]);
    compare_with_finite_differences(&operands(&capped, 5), |t| attention(&t[0], &t[1], &t[2], &capped, &plan));
    let x = Value::constant(random(&[5, 8], 1));
    let run = |shape: &AttentionShape| -> Vec<f32> {
        let kv = x.narrow_columns(0, 4).unwrap();
        attention(&x, &kv, &kv, shape, &plan).unwrap().tensor().flatten_all().unwrap().to_vec1().unwrap()
    };
    let difference = run(&capped).iter().zip(run(&shape(2, 1, 4))).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(difference > 0.01);
}

#[test]
fn a_window_and_an_encoder_agree_with_the_reference() {
    let forest = plan(&[(90, None), (3, Some(0)), (20, Some(0)), (1, Some(2)), (130, None)]);
    for window in [2, 7, 64, 100, 1000] {
        compare_both_forms(AttentionShape { window: Some(window), ..shape(4, 2, 8) }, &forest);
    }
    compare_both_forms(
        AttentionShape { causal: false, ..shape(2, 2, 16) },
        &plan(&[(7, None), (130, None), (1, None)]),
    );
    for window in [2, 5, 64, 200] {
        let local = AttentionShape { causal: false, window: Some(window), ..shape(2, 1, 16) };
        compare_both_forms(local, &plan(&[(33, None), (150, None), (1, None)]));
    }
}

#[test]
fn reference_agrees_with_finite_differences() {
    let plan = plan(&[(3, None), (2, Some(0)), (1, Some(0))]);
    let shape = AttentionShape { window: Some(3), ..shape(2, 1, 2) };
    compare_with_finite_differences(&operands(&shape, 6), |t| attention(&t[0], &t[1], &t[2], &shape, &plan));
}

#[test]
fn column_slices_of_one_matrix_are_read_with_their_stride() {
    let (shape, plan) = (shape(2, 1, 8), plan(&[(20, None), (9, Some(0))]));
    let columns = [(4, 16), (20, 8), (28, 8)];
    compare(
        &[Operand::new(&[29, 40])],
        |t| {
            let [q, k, v] = columns.map(|(start, len)| t[0].narrow_columns(start, len));
            attention(&q?, &k?, &v?, &shape, &plan)
        },
        |t| {
            let [q, k, v] = columns.map(|(start, len)| t[0].narrow(1, start, len));
            reference(&q?, &k?, &v?, &shape, &plan)
        },
    );
}

#[test]
fn a_window_of_one_gives_each_row_its_own_value() {
    let (shape, plan) = (AttentionShape { window: Some(1), ..shape(1, 1, 8) }, plan(&[(70, None), (5, Some(0))]));
    let [q, k, v] = [1, 2, 3].map(|seed| Value::constant(random(&[75, 8], seed)));
    assert_close("attention", attention(&q, &k, &v, &shape, &plan).unwrap().tensor(), v.tensor(), 1e-7);
}

/// Generation: one row a query, keys in a cache of other rows, of which most belong to nobody.
#[test]
fn one_row_queries_read_their_keys_from_a_cache() {
    let shape = shape(4, 2, 16);
    let queries = (0..5)
        .map(|index| Query { rows: span(index, 1), keys: vec![span(100, 37), span(200 + 50 * index, 3 + index)] });
    let plan = Arc::new(AttentionPlan { queries: queries.collect() });
    let kv = Operand::new(&[500, 32]);
    compare(
        &[Operand::new(&[5, 64]), kv.clone(), kv],
        |t| attention(&t[0], &t[1], &t[2], &shape, &plan),
        |t| reference(&t[0], &t[1], &t[2], &shape, &plan),
    );
}

/// Attention in all forms of block over a cache: single rows, few rows and many, of keys in one run or several, of
/// lengths that no tile divides; with the rows of the queries and of the cache.
fn cached() -> (Arc<AttentionPlan>, usize, usize) {
    let spans: [(usize, &[Span]); 8] = [
        (1, &[span(0, 1)]),
        (1, &[span(3, 64), span(90, 129)]),
        (1, &[span(3, 63), span(400, 1)]),
        (3, &[span(0, 700)]),
        (7, &[span(500, 2), span(10, 70), span(600, 9)]),
        (9, &[span(650, 9)]),
        (70, &[span(0, 131), span(200, 70)]),
        (150, &[span(300, 1), span(330, 330)]),
    ];
    let mut rows = 0;
    let queries = spans.into_iter().map(|(len, keys)| {
        rows += len;
        Query { rows: span(rows - len, len), keys: keys.to_vec() }
    });
    (Arc::new(AttentionPlan { queries: queries.collect() }), 242, 700)
}

/// Keys and values in bf16.
fn kept(rows: usize, shape: &AttentionShape) -> [Tensor; 2] {
    [2, 3].map(|seed| random(&[rows, shape.kv_heads * shape.head_dim], seed).to_dtype(DType::BF16).unwrap())
}

#[test]
fn keys_and_values_in_bf16_give_the_bits_of_the_same_numbers_in_f32() {
    let (plan, rows, keys) = cached();
    let bits = |x: &Value| -> Vec<u32> {
        x.tensor().flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    };
    for (heads, kv_heads, head_dim) in [(1, 1, 64), (4, 2, 16), (6, 1, 24), (2, 2, 5), (9, 3, 64), (4, 4, 128)] {
        let shape = shape(heads, kv_heads, head_dim);
        let q = random(&[rows, heads * head_dim], 1);
        let in_bf16 = kept(keys, &shape);
        let in_f32 = in_bf16.each_ref().map(|x| x.to_dtype(DType::F32).unwrap());
        for shape in [
            shape,
            AttentionShape { soft_cap: Some(2.0), ..shape },
            AttentionShape { window: Some(67), ..shape },
            AttentionShape { causal: false, ..shape },
        ] {
            let attend = |[k, v]: &[Tensor; 2]| {
                let [q, k, v] = [&q, k, v].map(|x| Value::constant(x.clone()));
                assert!(has_kernel_for(&q, &k, &v));
                attention(&q, &k, &v, &shape, &plan).unwrap()
            };
            let found = attend(&in_bf16);
            assert_eq!(bits(&found), bits(&attend(&in_f32)), "{shape:?}");
            // The path of devices without a kernel widens too.
            let expected = reference(&q.to_dtype(DType::F64).unwrap(), &in_bf16[0], &in_bf16[1], &shape, &plan);
            assert_close("attention", found.tensor(), &expected.unwrap(), 1e-5);
        }
    }
}

#[test]
fn bits_over_keys_in_bf16_do_not_depend_on_the_number_of_threads() {
    let ((plan, rows, keys), shape) = (cached(), shape(4, 2, 64));
    let [q, k, v] = {
        let [k, v] = kept(keys, &shape);
        [random(&[rows, 256], 1), k, v].map(Value::constant)
    };
    let on = |threads: usize| -> Vec<f32> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let found = pool.install(|| attention(&q, &k, &v, &shape, &plan)).unwrap();
        found.tensor().flatten_all().unwrap().to_vec1().unwrap()
    };
    let one = on(1);
    assert!(one == on(2) && one == on(3));
}

/// Kernels do not differentiate through bf16; the operation does all the same.
#[test]
fn queries_that_train_over_keys_in_bf16_have_their_gradient() {
    let ((plan, rows, keys), shape) = (cached(), shape(4, 2, 16));
    let q = random(&[rows, 64], 1);
    let in_bf16 = kept(keys, &shape);
    let in_f32 = in_bf16.each_ref().map(|x| x.to_dtype(DType::F32).unwrap());
    let gradient = |[k, v]: &[Tensor; 2]| {
        let operands = [q.clone(), k.clone(), v.clone()];
        let tracked = [true, false, false];
        let (value, mut gradients) = run(&operands, &tracked, |t| attention(&t[0], &t[1], &t[2], &shape, &plan));
        (value, gradients.swap_remove(0).unwrap())
    };
    let (found, expected) = (gradient(&in_bf16), gradient(&in_f32));
    assert_close("value", &found.0, &expected.0, 1e-5);
    assert_close("gradient of the queries", &found.1, &expected.1, 2e-5);
}

#[test]
fn rows_far_from_zero_do_not_overflow() {
    let (shape, plan) = (shape(1, 1, 8), plan(&[(70, None)]));
    let [q, k, v] = [1, 2, 3].map(|seed| random(&[70, 8], seed));
    let (q, k) = (q.affine(100.0, 0.0).unwrap(), k.affine(100.0, 0.0).unwrap());
    let double = [&q, &k, &v].map(|x| x.to_dtype(DType::F64).unwrap());
    let [q, k, v] = [q, k, v].map(Value::constant);
    let found = attention(&q, &k, &v, &shape, &plan).unwrap();
    let expected = reference(&double[0], &double[1], &double[2], &shape, &plan).unwrap();
    assert_close("attention", found.tensor(), &expected, 1e-2); // scores of 10⁴ hold three digits after the point
}

#[test]
fn a_plan_that_does_not_fit_is_an_error() {
    let x = Value::constant(random(&[4, 8], 1));
    let shape = shape(1, 1, 8);
    let attend = |queries: Vec<Query>| attention(&x, &x, &x, &shape, &Arc::new(AttentionPlan { queries }));
    let query = |start, len, keys: &[(usize, usize)]| Query {
        rows: span(start, len),
        keys: keys.iter().map(|&(start, len)| span(start, len)).collect(),
    };
    assert!(attend(vec![query(0, 4, &[(0, 4)])]).is_ok());
    assert!(attend(vec![query(0, 3, &[(0, 3)])]).is_err(), "a row without a query");
    assert!(attend(vec![query(0, 3, &[(0, 3)]), query(2, 2, &[(0, 4)])]).is_err(), "a row with two queries");
    assert!(attend(vec![query(0, 4, &[(1, 4)])]).is_err(), "keys outside");
    assert!(attend(vec![query(0, 4, &[(usize::MAX, 4)])]).is_err(), "keys far outside");
    assert!(attend(vec![query(0, 4, &[(0, 3)])]).is_err(), "fewer keys than rows");
    assert!(attention(&x, &x, &x, &AttentionShape { window: Some(0), ..shape }, &plan(&[(4, None)])).is_err());
    assert!(attention(&x, &x, &x, &AttentionShape { head_dim: 4, ..shape }, &plan(&[(4, None)])).is_err());
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let plan = plan(&[(100, None), (30, Some(0)), (90, Some(0)), (64, None), (130, None), (5, Some(4))]);
    let shape = shape(4, 2, 16);
    let tokens = tokens_of(&plan);
    // One long document, and a prefix that all segments see: their blocks are divided.
    for (len, prefix) in [(700, 0), (90, 5)] {
        let queries = (0..800 / len).map(|index| Query {
            rows: span(index * len, len),
            keys: vec![span(0, prefix), span(prefix + index * len, len)],
        });
        let shared = Arc::new(AttentionPlan { queries: queries.collect() });
        let kv = Operand::new(&[prefix + tokens_of(&shared), 32]);
        let operands = [Operand::new(&[tokens_of(&shared), 64]), kv.clone(), kv];
        let attend = |t: &[Value]| attention(&t[0], &t[1], &t[2], &shape, &shared);
        assert_same_bits_on_any_number_of_threads(&operands, attend);
        compare(&operands, attend, |t| reference(&t[0], &t[1], &t[2], &shape, &shared));
    }
    assert_same_bits_on_any_number_of_threads(&operands(&shape, tokens), |t| {
        attention(&t[0], &t[1], &t[2], &shape, &plan)
    });
    assert_same_bits_on_any_number_of_threads(&packed_operand(&shape, tokens), |t| {
        attention_packed(&t[0], &shape, &plan)
    });
}

/// Lengths and parents of up to eight segments.
fn forests() -> impl Strategy<Value = Vec<(usize, Option<usize>)>> {
    prop::collection::vec((1..40_usize, any::<prop::option::Probability>(), any::<u8>()), 1..8).prop_map(|segments| {
        let choose = |(index, (len, _, choice)): (usize, (usize, _, u8))| {
            let parent = choice as usize % (index + 1); // the segment itself stands for no parent
            (len, (parent < index).then_some(parent))
        };
        segments.into_iter().enumerate().map(choose).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// A segment whose ancestors are shared gives what the whole sequence gives alone, and the gradient of a shared row is the sum
    /// over the sequences that contain it.
    #[test]
    fn segments_that_share_ancestors_give_what_separate_sequences_give(
        segments in forests(),
        window in prop::option::of(1..60_usize),
    ) {
        let shape = AttentionShape { window, ..shape(2, 1, 8) };
        let shared = plan(&segments);
        let tokens = tokens_of(&shared);
        let single: Vec<Tensor> = [(1, 16), (2, 8), (3, 8)].map(|(seed, width)| random(&[tokens, width], seed)).to_vec();
        let together = run(&single, &[true; 3], |t| attention(&t[0], &t[1], &t[2], &shape, &shared));
        let apart = run(&single, &[true; 3], |t| {
            let mut results = Vec::new();
            for query in &shared.queries {
                let rows: Vec<u32> = query.keys.iter().flat_map(|span| span.start as u32..(span.start + span.len) as u32).collect();
                let count = rows.len();
                let [q, k, v] = [0, 1, 2].map(|index: usize| t[index].select_rows(&rows));
                let alone = attention(&q?, &k?, &v?, &shape, &plan(&[(count, None)]))?;
                results.push(alone.narrow_rows(count - query.rows.len, query.rows.len)?);
            }
            Value::cat_rows(&results.iter().collect::<Vec<_>>())
        });
        assert_close("value", &together.0, &apart.0, 1e-5);
        for (together, apart) in together.1.iter().zip(&apart.1) {
            assert_close("gradient", together.as_ref().unwrap(), apart.as_ref().unwrap(), 2e-5);
        }
    }
}
